"""If this fails, records give another sample in one layout than in another, or what cannot be read
does not say so.
"""

import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest
from support.layouts import every_layout, write_saved_dataset, write_table, write_tar
from support.published_rows import picture, turns
from support.scripts import train_flags
from support.tiny_parts import conversation, make_records

from dataset.records import json_array
from dataset.records.conversation import BadRecordError
from dataset.records.parquet import ParquetRecords
from dataset.records.reader import open_records
from trainer import train_sft_vlm


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return every_layout(tmp_path_factory.mktemp("layouts"))


NAMES = ["zip", "JSON array", "ms-swift", "Parquet", "TRL", "names in Parquet", "shards", "pattern",
    "Arrow folder", "tar"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_the_same_records(name, layouts):
    plain, records = open_records(*layouts["folder"]), open_records(*layouts[name])
    again = pickle.loads(pickle.dumps(records))
    assert len(plain) == len(records) == len(again) == 24
    for i in (*range(24), 0, 23, 7):
        wanted = plain[i]
        for found in (records, again):
            record = found[i]
            assert record.messages == wanted.messages and record.where == found.where(i)
            pictures = [found.read_image(image) for image in record.images]
            assert pictures == [plain.read_image(image) for image in wanted.images]
    assert records.fingerprint == again.fingerprint
    with pytest.raises(IndexError):
        records[24]


@pytest.mark.full
def test_every_layout_trains_to_the_same_bits(layouts, assets, tmp_path):
    losses = {}
    for name, (data, images) in layouts.items():
        out = tmp_path / name.replace(" ", "_")
        argv = train_flags(assets, out, data, images, epochs=2, batch_size=3)
        assert train_sft_vlm.main(argv) == 0
        lines = next((out / "out").glob("*_metrics.jsonl")).read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["folder"]) == 16
    for name, found in losses.items():
        assert found == losses["folder"], name


def test_typed_parts_may_bring_their_pictures(tmp_path):
    _, images = make_records(tmp_path, num_records=2)
    content = [
        {"type": "text", "text": "Compare"},
        {"type": "image", "image": "0_0.png"},
        {"type": "image_url", "image_url": {"url": "0_1.png"}},
        {"type": "text", "text": " and tell."},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Alike."}]}
    data = tmp_path / "a.jsonl"
    line = {"messages": [{"role": "user", "content": content}, answer]}
    data.write_text(json.dumps(line) + "\n" + json.dumps(line | {"images": ["0_0.png"]}))
    records = open_records(data, images)
    assert records[0].messages[0]["content"] == "Compare\n<image><image> and tell."
    assert records[0].images == ["0_0.png", "0_1.png"]
    with pytest.raises(BadRecordError, match="2: pictures stand in 'images' and in the parts"):
        records[1]


def test_other_writers_of_parquet(tmp_path):
    one, image = turns("<image>"), picture((200, 0, 0))
    struct = pyarrow.array([{"bytes": image, "path": None}] * 40)
    large = pyarrow.array([one] * 40, pyarrow.large_string())
    view = pyarrow.array([image] * 40, pyarrow.binary_view())
    path = tmp_path / "a.PARQ"
    for columns, options in (
        ({"conversations": large, "image": struct}, {"compression": "zstd"}),
        ({"messages": large, "image": struct, "__index_level_0__": list(range(40))}, {}),
        ({"conversations": large, "image_bytes": view}, {"data_page_version": "2.0"}),
        ({"conversations": [json.loads(one)] * 40, "image": struct}, {"store_schema": False}),
    ):
        write_table(path, columns, data_page_size=200, write_batch_size=4, **options)
        records = open_records(path, None)
        assert [records[i].images for i in (39, 0, 17)] == [[image]] * 3


def test_a_column_of_structs_is_read_by_pages(tmp_path):
    images = [picture((i, 9, 9), size=(20, 20), kind="BMP") for i in range(200)]
    struct = pyarrow.array([{"bytes": one, "path": f"{i}.bmp"} for i, one in enumerate(images)])
    options = {"data_page_size": 5_000, "write_batch_size": 2, "use_dictionary": False}
    columns = {"conversations": [turns("<image>")] * 200, "image": struct}
    records = ParquetRecords(write_table(tmp_path / "a.parquet", columns, **options))
    assert [records[i].images for i in (150, 3)] == [[images[150]], [images[3]]]
    (held,) = [array for array in records._pages._held.unpacked["image.bytes"].values()][:1]
    assert len(held) < 20  # of 200 rows in one row group


WHAT = "what can be read: JSON lines, a JSON array or Parquet with 'conversations'"


def test_what_cannot_be_read_says_what_can(tmp_path):
    cases = {}
    cases["no column 'conversations' or 'messages', only ['caption', 'image']"] = write_table(
        tmp_path / "captions.parquet", {"caption": ["x"], "image": [b"y"]}
    )
    (tmp_path / "coco.json").write_text('{"images": [],\n "annotations": []}')
    cases["coco.json is neither a JSON array of records nor"] = tmp_path / "coco.json"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    cases["notes is a folder that holds no data file (in it: a.txt)"] = tmp_path / "notes"
    for says, path in cases.items():
        with pytest.raises(ValueError) as caught:
            open_records(path, None)
        assert says in str(caught.value) and WHAT in str(caught.value)
    (tmp_path / "a.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    with pytest.raises(BadRecordError, match="1: no conversation in .*'question', 'answer'"):
        open_records(tmp_path / "a.jsonl", None)[0]


def test_a_folder_of_splits_or_of_several_kinds_is_not_guessed_at(tmp_path):
    columns = {"conversations": [turns("<image>")], "image": [picture()]}
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        write_table(tmp_path / name, columns)
    with pytest.raises(ValueError, match="holds the splits test, train; name one by a pattern"):
        open_records(tmp_path, None)
    assert len(open_records(tmp_path / "train-*.parquet", None)) == 1
    (tmp_path / "test-00000-of-00001.parquet").rename(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="holds 1 .tar, 1 .parquet; name those to read"):
        open_records(tmp_path, None)
    with pytest.raises(FileNotFoundError, match="no data file matches .*gone.*--data_path"):
        open_records(tmp_path / "gone-*.parquet", None)
    saved = write_saved_dataset(tmp_path / "train", [pyarrow.table(columns)])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match="holds the splits train; name one"):
        open_records(tmp_path, None)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../a.tar"}]}')
    with pytest.raises(ValueError, match="train/a.tar: not a readable Arrow file"):
        open_records(saved, None)


def test_samples_of_a_tar_are_checked(tmp_path):
    good = json.dumps(conversation("<image>", "A circle.")).encode()
    files = [("a/1.jpg", b"x"), ("a/1.json", good), ("a/._2.json", b"y"), ("a/2.png", b"z"),
        ("a/3.txt", b"w"), ("a/3.json", b"{"), ("a/4.json", good)]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", files)
    records = open_records(path, None)
    assert len(records) == 4 and records[0].images == [b"x"]
    for index, says in ((1, "0 .json files in it"), (2, "not valid JSON"), (3, "1 <image> tag")):
        with pytest.raises(BadRecordError, match=f"^a.tar:sample {index}: {says}"):
            records[index]
    path.write_bytes(path.read_bytes()[: 512 * 3 + 40])
    with pytest.raises(ValueError, match="a.tar.* (is cut off|not a readable tar)"):
        open_records(path, None)
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match="a.tar: not a readable tar file"):
        open_records(path, None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("broken", ['"图" 1', '"x": 1]', '"x": 1} 5', '"x": 1'])
def test_fault_of_an_array_is_told_by_its_place_in_the_file(
    broken, encoding, tmp_path, monkeypatch
):
    monkeypatch.setattr(json_array, "PARSE_CHUNK_BYTES", 64)
    good = json.dumps(conversation("什么？", "A circle."), indent=1, ensure_ascii=False)
    text = "[" + f"{good},\n" * 31 + "{" + broken
    path = tmp_path / "a.json"
    for whole in (text, text + f",\n{good}]"):
        path.write_text(whole, encoding=encoding)
        with pytest.raises(json.JSONDecodeError) as wanted:
            json.loads(whole)
        at = wanted.value
        num_bytes = len(whole[: at.pos].encode(encoding))
        says = f"line {at.lineno} column {at.colno} (byte {num_bytes}); mend or fetch"
        with pytest.raises(
            ValueError, match="a.json: no valid JSON array at record 3[12]"
        ) as caught:
            open_records(path, None)
        assert says in str(caught.value)
