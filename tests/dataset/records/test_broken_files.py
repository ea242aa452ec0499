"""If this fails, a file that is cut off or damaged loses records without a word, or is told of in
words that do not help.
"""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support.layouts import write_tar
from support.scripts import train_flags
from support.tiny_parts import conversation, make_records

from dataset.examining.faults import kind_of
from dataset.records import jsonl
from dataset.records.conversation import BadRecordError
from dataset.records.reader import open_records
from trainer import train_sft_vlm

TURNS = json.dumps(conversation("What?", "A circle."))


def make_tar(folder: Path) -> Path:
    files = [(f"{n}.json", TURNS.encode()) for n in range(6)]
    return write_tar(folder / "a.tar", files)


def test_a_tar_cut_off_anywhere_is_refused(tmp_path):
    path = make_tar(tmp_path)
    whole = path.read_bytes()
    end = 6 * 1024  # a header and a block each
    for size in range(512, end + 512, 256):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="a.tar: |a.tar is cut off; fetch it again"):
            open_records(path, None)
    path.write_bytes(whole[: end + 512])  # one block of zeros is an end
    assert len(open_records(path, None)) == 6


def test_a_damaged_header_or_a_joined_tar_does_not_end_the_records(tmp_path):
    path = make_tar(tmp_path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[3 * 1024 + 3] ^= 1
    for content in (bytes(damaged), whole + whole):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.tar: what stands behind byte [0-9]+ cannot be"):
            open_records(path, None)


def test_a_line_of_a_sparse_file_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    lines = 800 * f"{TURNS}\n"
    path.write_text(lines)
    with open(path, "ab") as file:
        file.truncate(len(lines) + (3 << 20))
    records = open_records(path, None)
    assert len(records) == 801 and records[799].messages
    with pytest.raises(BadRecordError, match="^a.jsonl:801: of 3 MiB, and a record may have 1;"):
        records[800]


def test_a_row_that_is_not_utf8_is_named_and_the_others_are_read(tmp_path):
    turns = json.dumps(json.loads(TURNS)["conversations"]).encode()
    texts = pyarrow.array([turns, b"\xff" + turns, turns], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"conversations": texts, "image_bytes": pyarrow.nulls(3)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    records = open_records(tmp_path / "a.parquet", None)
    assert records[0].messages == records[2].messages
    with pytest.raises(
        BadRecordError, match="^a.parquet:row 1: column 'conv.* is not UTF-8"
    ) as one:
        records[1]
    assert kind_of(str(one.value)) == "not UTF-8"


def test_parquet_that_is_none_says_why(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for content, why in ((whole[:-9], "cut off"), (lfs, "git-lfs pointer"), (b"", "size is 0")):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=f"a.parquet: not a readable Parquet file .*{why}"):
            open_records(tmp_path / "a.parquet", None)


def test_a_bad_path_of_validation_is_told_by_its_flag(assets, tmp_path, capfd):
    data, images = make_records(tmp_path, num_records=4)
    for name in ("val_data_path", "val_images_path"):
        paths = {"val_data_path": data, "val_images_path": images, name: tmp_path / "nowhere"}
        assert train_sft_vlm.main(train_flags(assets, tmp_path / name, data, images, **paths)) != 0
        assert "nowhere" in (told := capfd.readouterr().err) and f"by --{name}" in told
