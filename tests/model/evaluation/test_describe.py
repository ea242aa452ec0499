"""If this fails, describing a folder leaves pictures out, mixes up their answers, or writes a
gallery or JSON that does not show what the model said.
"""

import html.parser
import json
import os
import shutil
import weakref

import pytest
from support.painted import eval_flags
from support.scripts import ROOT

import eval_vlm
from model.evaluation import describe as describe_module

EVIL = '<img src=x onerror=alert(1)>&".png'


class Page(html.parser.HTMLParser):
    """What a browser would make of a gallery."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.text, self.tags = [], "", set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def photos(painted, tmp_path):
    """Three pictures, one of a nasty name, a pair of them in a sub-folder, and what is neither."""
    folder = tmp_path / "photos"
    (folder / "pair").mkdir(parents=True)
    (folder / "empty").mkdir()
    for i, name in enumerate(("a.png", "b.png", EVIL)):
        shutil.copy(painted / "images" / f"test{i:02}.png", folder / name)
        if i < 2:
            shutil.copy(painted / "images" / f"test{i:02}.png", folder / "pair" / f"{i}.png")
    (folder / "notes.txt").write_text("not looked at")
    (folder / "broken.jpg").write_text("no picture")
    return folder


def describe(assets, painted, photos, **values) -> dict:
    values = {
        "image_dir": photos,
        "prompt": "<image>\nDescribe it.",
        "max_new_tokens": 48,
        "temperature": 0,
        "json": photos / "out.json",
    } | values
    eval_vlm.main(eval_flags(assets, painted, **values))
    return json.loads((photos / "out.json").read_text())


def test_folder_with_a_sub_folder(assets, painted, photos, capfd):
    (photos / "phone.heic").write_bytes(b"\0\0\0\x1cftypheic")
    report = describe(assets, painted, photos)
    samples = {sample["name"]: sample for sample in report["samples"]}
    assert set(samples) == {"a.png", "b.png", EVIL, "pair", "broken.jpg", "phone.heic"}
    assert samples["pair"]["images"] == ["0.png", "1.png"] and samples["pair"]["answer"]
    assert "red" in samples["a.png"]["answer"] and "green" in samples["b.png"]["answer"]
    assert "not a readable image" in samples["broken.jpg"]["error"]
    assert "answer" not in samples["broken.jpg"]
    assert "it is HEIC; convert it to JPEG" in samples["phone.heic"]["error"]
    captured = capfd.readouterr()
    assert f"[a.png] {samples['a.png']['answer']}" in captured.out
    assert "error: broken.jpg: not a readable image" in captured.err


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_answers_do_not_depend_on_the_batch(temperature, assets, painted, photos):
    alone, together = (
        describe(assets, painted, photos, batch_size=size, temperature=temperature)["samples"]
        for size in (1, 8)
    )
    assert alone == together


def test_gallery_stands_alone_and_is_escaped(assets, painted, photos):
    (photos / "a.png").rename(photos / "<script>a.png")
    describe(
        assets, painted, photos, html=photos / "gallery.html", prompt="<image> <b>What</b> & why?"
    )
    page = Page((photos / "gallery.html").read_text(encoding="utf-8"))
    assert not page.tags & {"script", "b", "link"}
    assert len(page.images) == 5 and all(
        i["src"].startswith("data:image/jpeg") for i in page.images
    )
    assert {i["alt"] for i in page.images} >= {EVIL, "0.png"}
    assert "<b>What</b> & why?" in page.text and EVIL in page.text and "not a readable" in page.text


def sub_folder(painted, tmp_path, *, count: int):
    folder = tmp_path / "photos"
    (folder / "many").mkdir(parents=True)
    for i in range(count):
        os.link(painted / "images" / f"test{i % 10:02}.png", folder / "many" / f"{i}.png")
    return folder


@pytest.fixture
def decoded(monkeypatch) -> list:
    """How many pictures were in memory when each was decoded, itself included."""
    counts, pictures, real = [], [], describe_module.open_image

    def open_image(source):
        image = real(source)
        pictures.append(weakref.ref(image))
        counts.append(sum(picture() is not None for picture in pictures))
        return image

    monkeypatch.setattr(describe_module, "open_image", open_image)
    return counts


def test_pictures_of_a_sub_folder_are_decoded_one_after_another(assets, painted, tmp_path, decoded):
    folder = sub_folder(painted, tmp_path, count=20)
    report = describe(assets, painted, folder, html=folder / "gallery.html")
    assert report["samples"][0]["answer"] and len(report["samples"][0]["images"]) == 20
    assert len(decoded) == 20, "once each, the thumbnail included"
    assert max(decoded) <= 2  # the one before is let go of when the next takes its name
    page = Page((folder / "gallery.html").read_text(encoding="utf-8"))
    assert len(page.images) == 20


def test_too_many_pictures_are_refused_before_any_is_decoded(assets, painted, tmp_path, decoded):
    folder = sub_folder(painted, tmp_path, count=2100)  # of 16 tokens each
    (sample,) = describe(assets, painted, folder)["samples"]
    assert "use fewer images" in sample["error"] and not decoded


def test_pipe_and_dead_link_named_like_pictures_are_named(assets, painted, photos, tmp_path):
    (photos / "broken.jpg").unlink()
    (photos / "pair" / "lost.png").symlink_to("nowhere.png")
    os.mkfifo(photos / "pipe.png")
    report = describe(assets, painted, photos)
    errors = {s["name"]: s["error"] for s in report["samples"] if "error" in s}
    assert errors == {
        "pair": "lost.png: not a file, or a link to none",
        "pipe.png": "not a file, or a link to none",
    }


def test_sample_pictures_of_the_repository(assets, painted, tmp_path):
    folder = ROOT / "dataset" / "eval_multi_images"
    out = tmp_path / "out.json"
    flags = eval_flags(assets, painted, image_dir=folder, max_new_tokens=4, json=out)
    assert eval_vlm.main(flags) == 0
    samples = json.loads(out.read_text())["samples"]
    assert len(samples) == 3 and all(len(sample["images"]) == 2 for sample in samples)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_dir": "gone"}, "--image_dir gone is not a folder"),
        ({"json": "/proc/none/out.json"}, "there is no folder /proc/none"),
    ],
)
def test_wrong_use_is_one_clear_line(values, message, assets, painted, photos, capfd):
    (photos / "broken.jpg").unlink()
    flags = {"image_dir": photos, "max_new_tokens": 2} | values
    assert eval_vlm.main(eval_flags(assets, painted, **flags)) == 1
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1
