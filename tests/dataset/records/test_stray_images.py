"""If this fails, records whose pictures stand in fields that are not read train silently as text
alone, or harmless records are refused.
"""

import json

import pyarrow
import pyarrow.parquet
import pytest
from support.scripts import train_flags
from support.tiny_parts import conversation, make_records

from dataset.lm_dataset import VLMDataset
from dataset.records.conversation import BadRecordError
from dataset.records.jsonl import JsonlRecords
from dataset.records.reader import open_records
from trainer import train_sft_vlm

BLIND = {
    "list": ({"imgs": ["0_0.png"]}, "its pictures stand in 'imgs', which is not read"),
    "list of numbers": ({"photos": ["0001", "0002"]}, "'photos'"),
    "path": ({"image_path": "a/0_0.png"}, "'image_path'"),
    "img": ({"img": "0_0"}, "'img'"),
    "capital": ({"Image": "0_0.png"}, "'Image'"),
    "by its value": ({"file": "train/0_0.JPG"}, "'file'"),
    "address": ({"link": "https://example.org/a.webp?size=large"}, "'link'"),
    "dictionary": ({"media": {"path": "a.tiff", "bytes": None}}, "'media'"),
    "list of dictionaries": ({"pictures": [{"url": "a"}]}, "'pictures'"),
    "data URL": ({"attachment": "data:image/png;base64,iVBORw0KGgo="}, "'attachment'"),
    "base64": ({"image_base64": "iVBORw0KGgo="}, "'image_base64'"),
    "empty image too": ({"image": "", "pictures": ["0_0.png"]}, "'pictures'"),
}
BLIND_TAGS = [
    "<img>", "<img/>", "<Image>", "<IMAGE>", "<|image|>", "<|image_1|>", "<image_1>", "<image1>",
    "<Image 2>", "<image_placeholder>", "<ImageHere>", "<|image_pad|>", "<start_of_image>",
]  # fmt: skip
HARMLESS = [
    {"id": "0_0.png", "source": "coco/a.jpg", "types": ["caption"]},
    {"image_id": 17, "image_size": [640, 480], "num_images": 0, "has_image": False},
    {"images": [], "image_path": "", "img": None, "picture": {}, "pictures": [None, ""]},
    {"dataset": "LLaVA", "model": "x.y", "meta": {"license": "CC BY 4.0"}, "score": 0.5},
    {"note": "the file a.png is described\nin the text"},
]
HARMLESS_TEXTS = [
    'Mend <img src="a.png" alt="<image>">'.replace("<image>", "x"),
    "What does `<img>` do in HTML?",
    "Explain:\n```html\n<img>\n<Image>\n```",
    "Is a < b > c? <imagine> a <picture> or <video>",
]


def write(folder, record) -> JsonlRecords:
    (folder / "data.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return open_records(folder / "data.jsonl", folder / "images")


@pytest.mark.parametrize("case", BLIND)
def test_picture_in_a_field_that_is_not_read_is_refused(case, tmp_path):
    make_records(tmp_path, num_records=1)
    fields, says = BLIND[case]
    for question in ("What is this?", "<image>\nWhat is this?"):
        with pytest.raises(BadRecordError) as caught:
            write(tmp_path, conversation(question, "A circle.", **fields))[0]
        message = str(caught.value)
        assert message.startswith("data.jsonl:1: ") and says in message and "\n" not in message
        assert "put pictures into 'image', with <image> where each belongs" in message


@pytest.mark.parametrize("tag", BLIND_TAGS)
def test_tag_of_another_project_is_refused(tag, tmp_path):
    make_records(tmp_path, num_records=1)
    for fields in ({}, {"image": "0_0.png"}):
        with pytest.raises(BadRecordError, match="message 1 holds '.*', which is read as words"):
            write(tmp_path, conversation(f"{tag}\nWhat is this?", "A circle.", **fields))[0]
    assert write(tmp_path, conversation("How?", f"Write {tag} there."))[0]  # an answer may say so


def test_picture_in_a_message_is_refused(tmp_path):
    make_records(tmp_path, num_records=1)
    record = conversation("What is this?", "A circle.")
    record["conversations"][0]["images"] = ["0_0.png"]
    with pytest.raises(BadRecordError, match="message 1 has pictures in 'images'"):
        write(tmp_path, record)[0]
    for kind in ("video", "audio"):
        record["conversations"][0] = {"role": "user", "content": [{"type": kind, kind: "a.mp4"}]}
        with pytest.raises(BadRecordError, match=f"message 1 has a part of type '{kind}', but"):
            write(tmp_path, record)[0]


@pytest.mark.parametrize("fields", HARMLESS)
def test_harmless_fields_stay(fields, tmp_path):
    make_records(tmp_path, num_records=1)
    assert write(tmp_path, conversation("What?", "A circle.", **fields))[0].images == []


@pytest.mark.parametrize("text", HARMLESS_TEXTS)
def test_text_about_html_stays(text, tmp_path):
    make_records(tmp_path, num_records=1)
    assert write(tmp_path, conversation(text, "A circle."))[0]


def test_picture_that_is_read_may_be_named_once_more(tmp_path):
    make_records(tmp_path, num_records=1)
    fields = {"image": "0_0.png", "image_url": "https://example.org/0_0.png", "images": ["0_0.png"]}
    assert write(tmp_path, conversation("<image>\nWhat?", "A circle.", **fields))[0].images


def test_deep_nesting_ends(tmp_path):
    make_records(tmp_path, num_records=1)
    nested = json.loads("[" * 900 + "]" * 900)
    assert write(tmp_path, conversation("What?", "A circle.", tree=nested))[0]


def test_parquet_column_of_pictures_that_is_not_read_is_refused(tmp_path):
    _, images = make_records(tmp_path, num_records=1)
    encoded = (images / "0_0.png").read_bytes()
    turns = json.dumps(conversation("What?", "A circle.")["conversations"])
    for name, value in (
        ("img", {"bytes": encoded, "path": None}),
        ("photos", [encoded]),
        ("picture", encoded),
        ("file", "0_0.png"),
    ):
        columns = {
            "conversations": [turns, turns],
            "image_bytes": [None, None],
            name: [None, value],
            "id": ["a.png", "b.png"],
        }
        schema = {"image_bytes": pyarrow.list_(pyarrow.binary())}
        table = pyarrow.table({k: pyarrow.array(v, schema.get(k)) for k, v in columns.items()})
        pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
        records = open_records(tmp_path / "data.parquet", None)
        assert records[0].images == []
        with pytest.raises(BadRecordError, match=f"row 1: its pictures stand in '{name}'.*bytes'"):
            records[1]


def test_blind_data_does_not_train(assets, tmp_path, capfd):
    data, images = make_records(tmp_path / "data", num_records=8)
    records = [json.loads(line) for line in data.open()]
    text = "\n".join(
        json.dumps(conversation("What?", "A circle.", photos=[r.get("image", "")])) for r in records
    )
    data.write_text(text + "\n")
    assert train_sft_vlm.main(train_flags(assets, tmp_path, data, images)) == 1
    err = capfd.readouterr().err
    assert "of 8 samples cannot be used" in err and "its pictures stand in 'photos'" in err


def test_data_without_a_picture_trains_and_says_so(assets, tmp_path, capfd):
    data, images = make_records(tmp_path / "data", num_records=4)
    assert VLMDataset(data, images, None).has_images()
    data.write_text((json.dumps(conversation("What?", "A circle.")) + "\n") * 4)
    assert train_sft_vlm.main(train_flags(assets, tmp_path, data, images)) == 0
    said = "warning: data_0.jsonl: no usable record has a picture; only text is learnt from\n"
    assert capfd.readouterr().err.count(said) == 1
