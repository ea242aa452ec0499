"""If this fails, a data set can make the reader open what lies outside its images, or fill the
memory with one picture.
"""

import json
import os
import zipfile

import pytest
from support.tiny_parts import conversation, make_records

from dataset.records import images as images_module
from dataset.records.conversation import BadRecordError
from dataset.records.images import ImageFolder, ImageZip
from dataset.records.reader import open_records


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """Records' images with a secret beside them; fails when anything else is opened."""
    _, images = make_records(tmp_path, num_records=2)
    secret = tmp_path / "secret.png"
    secret.write_bytes((images / "0_0.png").read_bytes())
    opened, plain_open = [], open

    def watched(path, *args, **kwargs):
        opened.append(os.path.realpath(path))
        return plain_open(path, *args, **kwargs)

    monkeypatch.setattr(images_module, "open", watched, raising=False)
    yield tmp_path, images, secret
    inside = os.path.realpath(images) + os.sep
    assert all(path.startswith(inside) for path in opened)


def test_nothing_outside_the_images_is_opened(guarded):
    folder, images, secret = guarded
    (images / "link.png").symlink_to(secret)
    (images / "up").symlink_to(folder)
    (images / "sub").mkdir()
    (images / "sub" / "in.png").symlink_to("../0_0.png")
    os.link(images / "0_1.png", images / "hard.png")
    (folder / "images_too").mkdir()
    (folder / "images_too" / "a.png").write_bytes(b"x")
    names = ["../secret.png", str(secret), "link.png", "up/secret.png", "sub/../../secret.png",
        "../images_too/a.png"]  # fmt: skip
    data = folder / "a.jsonl"
    for name in names:
        data.write_text(json.dumps(conversation("<image>", "x", image=name)))
        with pytest.raises(BadRecordError, match="^a.jsonl:1: image .* leads out of .*nothing out"):
            open_records(data, images)[0]
        with pytest.raises(ValueError, match="leads out of"):
            ImageFolder(images).read(name)
    for name in ("sub/in.png", "hard.png", "./0_0.png", "sub/../0_0.png"):
        data.write_text(json.dumps(conversation("<image>", "x", image=name)))
        records = open_records(data, images)
        assert records.read_image(records[0].images[0])


def test_the_images_folder_may_be_a_link_itself(tmp_path):
    data, images = make_records(tmp_path, num_records=1)
    (tmp_path / "linked").symlink_to(images)
    records = open_records(data, tmp_path / "linked")
    assert records.read_image(records[0].images[0])


def test_odd_names_stay_one_line(tmp_path):
    _, images = make_records(tmp_path, num_records=1)
    (images / "new\nline.png").write_bytes((images / "0_0.png").read_bytes())
    data = tmp_path / "a.jsonl"
    for name in ("gone\nline.png", "nul\0.png", "x" * 5000, "\ud800.png", "", " ", ".", "sub/"):
        data.write_text(json.dumps(conversation("<image>", "x", image=name)))
        with pytest.raises(BadRecordError) as caught:
            open_records(data, images)[0]
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    data.write_text(json.dumps(conversation("<image>", "x", image="new\nline.png")))
    records = open_records(data, images)
    assert records.read_image(records[0].images[0])


def test_a_picture_that_would_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    _, images = make_records(tmp_path, num_records=1)
    with open(images / "sparse.png", "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    says = "'sparse.png' is of 1,048,576 MiB, and a picture's file may have 256"
    with pytest.raises(ValueError, match=says):
        ImageFolder(images).read("sparse.png")
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(3 << 20))
        archive.writestr("../../up.png", b"up")
    assert bomb.stat().st_size < 1 << 14
    monkeypatch.setattr(images_module, "MAX_IMAGE_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="'a.png' is of 3 MiB, and a picture's file may have 1:"):
        ImageZip(bomb).read("a.png")
    assert ImageZip(bomb).read("../../up.png") == b"up"  # read in place, written nowhere
    assert not (tmp_path.parent.parent / "up.png").exists()


def test_a_zip_that_says_less_than_it_holds_is_cut_there(tmp_path):
    path = tmp_path / "lies.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 20))
    data = bytearray(path.read_bytes())
    size = (1 << 20).to_bytes(4, "little")
    while (place := data.find(size)) >= 0:
        data[place : place + 4] = (100).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.png in lies.zip cannot be read .*CRC"):
        ImageZip(path).read("a.png")
