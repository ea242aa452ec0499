"""If this fails, `make photos` breaks off, repeats work, trains on the photos that it is scored on,
or reports other figures than were measured.
"""

import io
import json
import zipfile

import pytest
from PIL import Image
from support.tiny_parts import COLOURS, conversation
from support.warm import run_step

from model.vlm_processor import load_tokenizer, tokenizer_sha256
from trainer import photos as command
from trainer.chain import photo_steps
from trainer.chain.photo_report import FONTS, find_examples
from trainer.chain.photo_settings import MODEL, Photos
from trainer.chain.photo_steps import check_inputs, cut_records, records
from trainer.chain.taught import PHOTOS_TAUGHT

CAPTIONS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色"}


def questions(colour):
    chinese = CAPTIONS[colour]
    return (
        (
            "<image>\nWhat is it?",
            f"There is a plain {colour} photo.",
            f"All that is here is {colour}.",
        ),
        ("这是什么？\n<image>", f"一张{chinese}的照片。", f"全是{chinese}。"),
    )


def make_photos(folder, *, num_train=24, num_val=12):
    """Plain coloured photos in the layout of Flickr8k, two captions a language."""
    for split, num in (("train", num_train), ("val", num_val)):
        (folder / split).mkdir(parents=True)
        lines = []
        with zipfile.ZipFile(folder / split / "images.zip", "w") as archive:
            for i in range(num):
                colour, name = COLOURS[i % 4], f"{split}_{i}.jpg"
                buffer = io.BytesIO()
                Image.new("RGB", (32, 32), colour).save(buffer, "JPEG")
                archive.writestr(name, buffer.getvalue())
                for question, *answers in questions(colour):
                    lines += [conversation(question, answer, image=name) for answer in answers]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / split / "data.jsonl").write_text(text, encoding="utf-8")
    return folder


def run_quickly(*words) -> None:
    """Training in float32: many a CPU takes several times as long for bfloat16."""
    run_step(*words, *(("--dtype", "float32") if "trainer/train_s" in words[0] else ()))


@pytest.mark.slow
def test_whole_chain_runs_and_finds_what_is_done(assets, tmp_path, capfd, monkeypatch):
    data = make_photos(tmp_path / "data")
    monkeypatch.setattr(photo_steps, "run_script", run_quickly)
    monkeypatch.setitem(MODEL, "image_size", 32)  # 4 image tokens of the tests' tower, not 256
    monkeypatch.chdir(tmp_path)  # the user's own folder: relative paths are meant from here
    argv = ["--data", "data", "--out", "out", "--tower", str(assets / "tower"), "--epochs", "2"]
    assert command.main(argv) == 0
    out = capfd.readouterr().out
    for text in (
        "12 held-back photos", "English", "Chinese", "gap to another photo",
        "right caption likeliest (chance", "with another's photo", "CIDEr-D", "jieba's words",
        "NeuralTalk", "57.9 38.3 24.5 16.0", "21.3", "eval_vlm.py --chat", "web_demo.py",
        "Epoch:[2/2](3/3)", "rewards: CIDEr-D and BLEU-4 against", "reward:",
    ):  # fmt: skip
        assert text in out, text
    folder = tmp_path / "out"
    assert Image.open(folder / "report.png").size > (800, 800)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["decoding"]["num_beams"] == 5
    assert len(scores["generated"]) == 24  # every photo, in both languages
    for language in ("en", "zh"):
        assert scores["languages"][language]["num_generated"] == 12
    examples = find_examples(Photos(data=data, folder=folder), scores)
    assert [set(e.answers) for e in examples] == [{"en", "zh"}] * 12
    for example in examples:
        colour = example.references["en"].removeprefix("There is a plain ").removesuffix(" photo.")
        shown = Image.open(io.BytesIO(example.image)).getpixel((5, 5))
        right = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(shown, right, strict=True)) < 4
    assert list((folder / "features").rglob("*.features"))
    weight = json.loads((folder / "photos_192.json").read_text())
    own = load_tokenizer(folder / "tokenizer")
    assert weight["tokenizer_sha256"] == tokenizer_sha256(own)
    assert weight["taught"] == PHOTOS_TAUGHT
    shown = {question["picture"] for question in PHOTOS_TAUGHT["questions"]}
    assert shown < {path.name for path in (folder / "examples").iterdir()}
    assert "--prompt '<image> Describe the picture in one sentence.' --weight" in out
    assert f"--examples {folder / 'examples'}" in out
    assert len(own.encode(" red", add_special_tokens=False)) == 1, "it knows the captions' words"
    assert command.main(argv) == 0
    again = capfd.readouterr().out
    assert "Epoch:[" not in again and "eval_vlm.py --weight" not in again.partition("Talk")[0]
    assert "12 held-back photos" in again
    path = data / "val" / "data.jsonl"  # other photos to score: the scores are made anew
    path.write_text(path.read_text(encoding="utf-8").replace("plain", "$5 or $6"), "utf-8")
    started = []
    with monkeypatch.context() as patched:
        patched.setattr(photo_steps, "run_script", lambda *words: started.append(words))
        photos = Photos(data=data, folder=folder, tower=assets / "tower", epochs=2)
        photo_steps.evaluate(photos)
        assert [words[0] for words in started] == ["eval_vlm.py"]
        photo_steps.evaluate(photos)
        assert len(started) == 1, "of these photos there are scores now"
    argv[-1] = "3"
    assert command.main(argv) == 1
    assert "was made with another recipe; remove it" in capfd.readouterr().err


def test_cut_photos_are_neither_trained_on_nor_the_validation_photos(assets, tmp_path):
    data = make_photos(tmp_path / "data")
    photos = Photos(data=data, folder=tmp_path, num_cut=5)
    cut_records(photos)
    found = {}
    for split in ("train", "val"):
        path, images = records(photos, split)
        assert images == data / "train" / "images.zip"
        found[split] = path.read_text(encoding="utf-8").splitlines()
    names = {k: {json.loads(line)["image"] for line in lines} for k, lines in found.items()}
    assert len(names["val"]) == 5 and len(names["train"]) == 19
    assert not names["val"] & names["train"]
    whole = (data / "train" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(found["train"] + found["val"]) == sorted(whole)
    before = found["val"]
    cut_records(photos)
    assert records(photos, "val")[0].read_text(encoding="utf-8").splitlines() == before
    with pytest.raises(ValueError, match="--num_cut 24: there are 24 training photos"):
        check_inputs(Photos(data=data, tower=assets / "tower", num_cut=24))


def test_records_of_any_shape_are_cut(tmp_path):
    """A BOM, a blank line, a line separator within a caption, a list of images, none."""
    data = make_photos(tmp_path / "data", num_train=3)
    path = data / "train" / "data.jsonl"
    whole = path.read_text(encoding="utf-8")
    odd = [
        conversation("<image>\nWhat?", "One\u2028two.", image="train_0.jpg"),
        conversation("<image>\nWhat?", "A list.", image=["train_1.jpg"]),
        conversation("What?", "No photo."),
    ]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in odd)
    path.write_text("\ufeff" + whole + "\n" + lines, encoding="utf-8")
    photos = Photos(data=data, folder=tmp_path, num_cut=2)
    cut_records(photos)
    found = [records(photos, split)[0].read_text(encoding="utf-8") for split in ("train", "val")]
    assert sum(text.count("\n") for text in found) == 12 + 3
    assert "No photo" in found[0] and "\u2028" in "".join(found)
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="data.jsonl:1 is no JSON object"):
        cut_records(photos)


def test_without_photos_the_way_to_them_is_named(tmp_path, capsys):
    assert command.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "dataset/download.py flickr8k" in err and "--data" in err
    assert not (tmp_path / "out").exists()
    data = make_photos(tmp_path / "data", num_train=1, num_val=1)
    photos = Photos(data=data, tower=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no config.json, so it is no tower"):
        check_inputs(photos)
    (data / "val" / "images.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"val.images\.zip is empty or damaged"):
        check_inputs(photos)
    (data / "val" / "images.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"val.images\.zip is missing"):
        check_inputs(Photos(data=data))


def test_tower_is_fetched_only_where_it_is_missing(assets, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(photo_steps, "run_script", lambda *words: started.append(words))
    photo_steps.fetch_tower(Photos(tower=assets / "tower"))
    assert not started
    photo_steps.fetch_tower(Photos(tower=tmp_path / "tower"))
    assert started == [("dataset/download.py", "photo_tower", "--yes")]


def test_seeds_share_the_features_and_nothing_else():
    usual, other = Photos(), Photos(seed=7)
    assert other.features == usual.features
    assert other.out == usual.folder / "seed_7" and other.weight.parent == other.out


@pytest.mark.parametrize("argv", [["--num_cut", "-1"], ["--epochs", "0"], ["--seed", "-3"]])
def test_flags_out_of_range_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        command.parse_args(argv)
    assert f"{argv[0]} must be" in capsys.readouterr().err


def test_fonts_of_the_report_are_not_named_twice():
    assert len(set(FONTS)) == len(FONTS)
