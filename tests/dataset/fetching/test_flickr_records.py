"""If this fails, other records or pictures are made of Flickr8k than those that results were
measured on, or a damaged or wrong file passes for a published one.
"""

import io
import json

import pytest
from PIL import Image
from support.fake_hub import error_of, run
from support.flickr_files import (
    CHINESE,
    PHOTOS,
    TEXTS,
    TRAIN,
    VAL,
    chinese_file,
    kept,
    photo_zip,
    picture,
    publish,
    records,
    text_zip,
)

from dataset.fetching import flickr_captions, flickr_records
from dataset.fetching.flickr8k import FOLDER, PUBLISHED_FOLDER


@pytest.mark.parametrize("size", [(448, 224), (224, 448), (30, 20)])
def test_photos_are_cropped_to_their_middle_not_squeezed(size):
    image = Image.new("RGB", size, "red")
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste("green", (left, top, left + side, top + side))
    file = io.BytesIO()
    image.save(file, "PNG")
    small = Image.open(io.BytesIO(flickr_records.shrink(file.getvalue())))
    assert small.size == (224, 224)
    for corner in ((3, 3), (220, 3), (3, 220), (220, 220)):
        red, green, _ = small.getpixel(corner)
        assert green > red


def test_photo_is_turned_upright_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the left half is the top
    image = Image.new("RGB", (300, 300), "red")
    image.paste("blue", (0, 0, 150, 300))
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    small = Image.open(io.BytesIO(flickr_records.shrink(file.getvalue())))
    top, bottom = small.getpixel((112, 20)), small.getpixel((112, 200))
    assert top[2] > top[0] and bottom[0] > bottom[2]


BAD_CHINESE = {
    "English": (chinese_file(kind="enc"), ("captions of kind enc", "expected zhc")),
    "machine": (chinese_file(kind="zhb"), ("captions of kind zhb", "expected zhc")),
    "a page": (b"<!DOCTYPE html>\n<html>\n", ("NAME.jpg#zhc#0", "<!DOCTYPE html>")),
    "empty": (b"", ("no caption",)),
    "not text": (b"\xff\xfe\x00", ("not UTF-8",)),
    "torn": (chinese_file()[: len(chinese_file()) // 2], ("Chinese captions", "expected 5")),
    "no Chinese": (
        b"".join(b"%s#zhc#%d a dog\n" % (n.encode(), i) for n in (*TRAIN, *VAL) for i in range(5)),
        ("no Chinese character", "a dog"),
    ),
}


@pytest.mark.parametrize("case", BAD_CHINESE)
@pytest.mark.parametrize("own", [False, True], ids=["fetched", "own"])
def test_other_file_than_the_chinese_captions_is_refused(
    case, own, flickr, tmp_path, capfd, monkeypatch
):
    data, words = BAD_CHINESE[case]
    if own:
        (tmp_path / PUBLISHED_FOLDER).mkdir(parents=True)
        (tmp_path / PUBLISHED_FOLDER / CHINESE).write_bytes(data)
    else:
        publish(flickr, monkeypatch, zhc=data)
    error = error_of(capfd, tmp_path, "flickr8k")
    assert CHINESE in error and all(word in error for word in words), error
    assert (CHINESE in kept(tmp_path)) == own, "what was fetched goes, what is the user's stays"
    assert not flickr.ranges(PHOTOS) and not (tmp_path / FOLDER).exists()


BAD_TEXTS = {
    "short list": (
        {"train": b"11_a.jpg\n12_b.jpg\n"},
        ("Flickr_8k.trainImages.txt", "2 photos", "expected 3"),
    ),
    "twice": (
        {"train": b"11_a.jpg\n11_a.jpg\n12_b.jpg\n"},
        ("Flickr_8k.trainImages.txt", "11_a.jpg stands there twice"),
    ),
    "in both": (
        {"dev": b"11_a.jpg\n4_e.jpg\n"},
        ("11_a.jpg", "Flickr_8k.trainImages.txt and Flickr_8k.devImages.txt"),
    ),
    "no captions": ({"token": b"one\ntwo\n"}, ("NAME.jpg#0", "'one'")),
    "four captions": (
        {"token": b"11_a.jpg#0\tA dog .\n"},
        ("English captions", "expected 5", "11_a.jpg"),
    ),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_other_texts_are_refused(case, flickr, tmp_path, capfd, monkeypatch):
    changed, words = BAD_TEXTS[case]
    publish(flickr, monkeypatch, text=text_zip(**changed))
    error = error_of(capfd, tmp_path, "flickr8k")
    assert TEXTS in error and all(word in error for word in words), error
    assert not (tmp_path / FOLDER).exists() and not flickr.ranges(PHOTOS)


def test_broken_and_missing_photos_are_counted_and_named(flickr, tmp_path, capfd, monkeypatch):
    assert run(tmp_path / "whole", "flickr8k") == 0
    capfd.readouterr()
    publish(flickr, monkeypatch, Dataset=photo_zip(b=picture()[:300], e=None))
    assert run(tmp_path, "flickr8k") == 0
    out = capfd.readouterr().out
    assert "2 photos to train on and 1 to validate with" in out
    assert "2 photos are left out" in out and "12_b.jpg (" in out
    assert "4_e.jpg (not in Flickr8k_Dataset.zip)" in out
    for split, gone in (("train", "12_b.jpg"), ("val", "4_e.jpg")):
        whole = records(tmp_path / "whole", split)
        assert records(tmp_path, split) == [r for r in whole if r["image"] != gone]
    run(tmp_path, "flickr8k")
    assert "2 photos are left out" in capfd.readouterr().out, "said of the finished folder too"


def test_damaged_member_of_the_photos_is_left_out(flickr, tmp_path, capfd, monkeypatch):
    data = photo_zip(b=picture((64, 64), "green"))
    at = data.index(picture((64, 64), "green")) + 200
    publish(flickr, monkeypatch, Dataset=data[:at] + b"\x00\x01\x02" + data[at + 3 :])
    assert run(tmp_path, "flickr8k") == 0
    out = capfd.readouterr().out
    assert "1 photo is left out" in out and "12_b.jpg (" in out


def test_zip_of_other_photos_is_refused(flickr, tmp_path, capfd, monkeypatch):
    publish(flickr, monkeypatch, Dataset=photo_zip(a=None, b=None, c=None))
    error = error_of(capfd, tmp_path, "flickr8k")
    assert PHOTOS in error and "3 of 3 photos of train" in error and "11_a.jpg" in error
    assert not (tmp_path / FOLDER).exists()
    monkeypatch.setattr(flickr_records, "MAX_LEFT_OUT", 1)
    publish(flickr, monkeypatch, Dataset=photo_zip(a=None, b=None))
    (tmp_path / PUBLISHED_FOLDER / PHOTOS).unlink()
    assert "2 of 3 photos of train" in error_of(capfd, tmp_path, "flickr8k")


LINES = {
    "11_a.jpg#0\ta child plays .": ("11_a.jpg", None, 0, "a child plays ."),
    "11_a.jpg#zhc#4 一只狗。": ("11_a.jpg", "zhc", 4, "一只狗。"),
    "11_a.jpg#enc#1 A dog": ("11_a.jpg", "enc", 1, "A dog"),
    "11_a#zhc#2\t一只狗": ("11_a.jpg", "zhc", 2, "一只狗"),
    "2258277193_586949ec62.jpg.1#0\tA dog": ("2258277193_586949ec62.jpg.1", None, 0, "A dog"),
}


@pytest.mark.parametrize("line", LINES)
def test_known_forms_of_a_caption_line_are_read(line):
    assert flickr_captions.parse_line(line) == LINES[line]


def test_byte_order_mark_and_windows_lines_are_read(flickr, tmp_path, monkeypatch):
    publish(flickr, monkeypatch, zhc=b"\xef\xbb\xbf" + chinese_file().replace(b"\n", b"\r\n"))
    assert run(tmp_path, "flickr8k") == 0


NORMAL = {
    ("en", "a dog runs ."): "A dog runs.",
    ("en", "A dog runs"): "A dog runs.",
    ("en", "  Two  dogs\trun . "): "Two dogs run.",
    ("en", "Man on an ATV catching air !"): "Man on an ATV catching air !.",
    ("en", "Two men play basketball , ."): "Two men play basketball ,.",
    ("en", "A man smiles . a ."): "A man smiles . a.",
    ("en", " . "): "",
    ("zh", "一只狗"): "一只狗。",
    ("zh", " 一只狗。 "): "一只狗。",
    ("zh", "一个女孩。另一个男人。"): "一个女孩。另一个男人。",
    ("zh", "。"): "",
}


@pytest.mark.parametrize("case", NORMAL)
def test_captions_begin_and_end_as_sentences(case):
    assert flickr_captions.normalise(case[1], language=case[0]) == NORMAL[case]


@pytest.mark.parametrize("split", ["train", "val"])
def test_records_are_those_of_the_photos_that_results_were_measured_on(split, shared):
    """Only quotation marks differ: these were doubled there."""
    path = shared / "data/flickr8k224" / split / "data.jsonl"
    text = path.read_text(encoding="utf-8")
    captions: dict[str, list[str]] = {}
    for line in text.splitlines():
        record = json.loads(line)
        answer = record["conversations"][1]["content"]
        captions.setdefault(record["image"], []).append(answer)
    photos = [
        flickr_captions.Photo(name, {"en": tuple(ten[:5]), "zh": tuple(ten[5:])})
        for name, ten in captions.items()
    ]
    made = "".join(line for _, lines in flickr_records.draw_records(photos) for line in lines)
    assert made == text
    for name, ten in captions.items():
        for number, answer in enumerate(ten):
            language = "en" if number < 5 else "zh"
            published = answer[0].lower() + answer[1:-1] + (" ." if language == "en" else "")
            again = flickr_captions.normalise(published, language=language)
            assert again == answer[0].upper() + answer[1:], name
