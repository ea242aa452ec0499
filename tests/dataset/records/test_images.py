"""If this fails, one damaged picture or zip file ends a whole run, or a pipe named like a picture
makes it hang.
"""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image
from support.scripts import within_s
from support.tiny_parts import conversation, make_records

from dataset.lm_dataset import BadSample, VLMDataset
from dataset.records.conversation import BadRecordError
from dataset.records.images import ImageFolder, ImageZip
from dataset.records.reader import open_records
from model.vision.pictures import open_image

METHODS = {
    "stored": zipfile.ZIP_STORED,
    "deflated": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


def zip_with(folder, method: int):
    """A zip of one picture, and where its compressed bytes begin and end."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.bmp")
    path = folder / "images.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.write(folder / "a.bmp", "a.bmp")
        info = archive.getinfo("a.bmp")
    start = info.header_offset + 30 + len("a.bmp")
    return path, start, start + info.compress_size


def stub_processor(messages, images, *, max_length):
    """Decodes as the real one does and goes no further."""
    for image in images:
        open_image(image)
    raise ValueError("whole")


@pytest.mark.parametrize("method", METHODS)
def test_damaged_member_is_a_bad_sample_of_its_name(method, tmp_path):
    path, start, end = zip_with(tmp_path, METHODS[method])
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps(conversation("<image>", "x", image="a.bmp")))
    whole, rng, reasons = path.read_bytes(), np.random.default_rng(1), []
    for trial in range(60):
        damaged = bytearray(whole)
        if trial < 30:  # the first bytes say how the rest is to be unpacked
            damaged[start + trial % 12] = rng.integers(256)
        else:
            for place in rng.integers(start, end, 40):
                damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        dataset = VLMDataset(data, path, stub_processor, on_bad_sample="return")
        sample = dataset[0]
        assert isinstance(sample, BadSample) and "a.bmp" in sample.reason
        reasons.append(sample.reason)
    assert sum("a.bmp in images.zip cannot be read (" in reason for reason in reasons) > 30
    assert all("cannot be read ()" not in reason and "\n" not in reason for reason in reasons)


def test_damaged_directory_of_a_zip_is_one_line(tmp_path):
    path, _, end = zip_with(tmp_path, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[end] ^= 255  # the first byte of the directory
    path.write_bytes(data)
    assert zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match="images.zip: not a readable zip file"):
        pickle.loads(pickle.dumps(ImageZip(path))).exists("a.bmp")


def test_fifo_or_device_named_like_a_picture_is_not_opened(tmp_path):
    _, images = make_records(tmp_path, num_records=1)
    os.mkfifo(images / "pipe.png")
    (images / "folder.png").mkdir()
    (images / "linked.png").symlink_to("pipe.png")
    (images / "device.png").symlink_to("/dev/null")
    (images / "good.png").symlink_to("0_0.png")
    data = tmp_path / "a.jsonl"
    says = {"device.png": "leads out of"}  # and is not opened, whatever it leads to
    with within_s(10):
        for name in ("pipe.png", "folder.png", "linked.png", "device.png"):
            data.write_text(json.dumps(conversation("<image>", "x", image=name)))
            with pytest.raises(BadRecordError, match=f"^a.jsonl:1: .*{name}"):
                dataset = VLMDataset(data, images, stub_processor)
                dataset[0]
            what = says.get(name, "in .* is a folder, FIFO or device")
            with pytest.raises(ValueError, match=f"{name}'? {what}"):
                ImageFolder(images).read(name)
    data.write_text(json.dumps(conversation("<image>", "x", image="good.png")))
    records = open_records(data, images)
    assert records.read_image(records[0].images[0]) == (images / "0_0.png").read_bytes()
    with pytest.raises(FileNotFoundError):
        ImageFolder(images).read("gone.png")
