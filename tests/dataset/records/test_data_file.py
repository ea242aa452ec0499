"""If this fails, a data file in another encoding, a binary file or a pipe ends in a traceback,
hangs, or is read as wrong text.
"""

import gzip
import json
import os

import pytest
from support.scripts import train_flags, within_s
from support.tiny_parts import conversation, make_records

from dataset.records.conversation import BadRecordError
from dataset.records.reader import open_records
from dataset.text_dataset import TextDataset
from model.vlm_processor import load_tokenizer
from trainer import train_llm, train_pretrain_vlm

RECORDS = [conversation("What?", "A circle."), conversation("图像里有什么？", "一个圆形。")] * 20
JSONL = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n"
WIDE = ("UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32", "UTF-32LE", "UTF-32BE")


@pytest.fixture(scope="module")
def tokenizer(assets):
    return load_tokenizer(assets / "tokenizer")


@pytest.mark.parametrize("encoding", WIDE)
def test_wide_encodings_are_refused_with_the_way_to_convert(encoding, tokenizer, tmp_path):
    says = f"is text in {encoding}, not UTF-8; convert it: `iconv -f {encoding} -t UTF-8 "
    (tmp_path / "a.jsonl").write_bytes(JSONL.encode(encoding))
    (tmp_path / "a.txt").write_bytes("A red circle.\n一个红色的圆形。\n".encode(encoding))
    for name, read in (
        ("a.jsonl", lambda path: open_records(path, None)),
        ("a.jsonl", lambda path: TextDataset(path, tokenizer)),
        ("a.txt", lambda path: TextDataset(path, tokenizer)),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_utf8_byte_order_mark_is_no_text(tokenizer, tmp_path):
    for name, content in (("a.jsonl", JSONL), ("a.txt", "A red circle.\nA circle.\n")):
        (tmp_path / f"marked_{name}").write_text(content, encoding="utf-8-sig")
        (tmp_path / name).write_text(content, encoding="utf-8")
        marked, plain = (TextDataset(tmp_path / n, tokenizer) for n in (f"marked_{name}", name))
        assert not marked.find_bad_records() and marked.tokens.tolist() == plain.tokens.tolist()
    marked, plain = (open_records(tmp_path / n, None) for n in ("marked_a.jsonl", "a.jsonl"))
    assert all(marked[i].messages == plain[i].messages for i in range(len(plain)))


def test_a_line_in_another_encoding_is_a_bad_record(tmp_path):
    lines = [json.dumps(RECORDS[1], ensure_ascii=False).encode(e) for e in ("utf-8", "gbk")]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    records = open_records(tmp_path / "a.jsonl", None)
    assert records[0].messages[1]["content"] == "一个圆形。"
    with pytest.raises(BadRecordError, match="^a.jsonl:2: not UTF-8 .*save the file as UTF-8"):
        records[1]


def test_binary_files_are_named(tokenizer, tmp_path):
    for content, says in (
        (gzip.compress(JSONL.encode()), "is compressed; unpack it by `gunzip`"),
        (b"PK\x03\x04" + bytes(60), "is a zip archive; unpack it"),
        (b"PAR1" + bytes(60), "is a Parquet file; name it .parquet"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (bytes(range(256)) * 9 + bytes(99), "is a binary file, not text"),
    ):
        for name in ("a.jsonl", "a.txt"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} {says}"):
                TextDataset(tmp_path / name, tokenizer)
        with pytest.raises(ValueError, match=f"a.jsonl {says}"):
            open_records(tmp_path / "a.jsonl", None)


def test_only_a_regular_file_is_opened(assets, tmp_path, capfd):
    _, images = make_records(tmp_path, num_records=1)
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe.jsonl", "pipe.parquet", "pipe.txt"):
        os.mkfifo(tmp_path / name)
    with within_s(60):
        for name in ("pipe.jsonl", "pipe.parquet", "folder.jsonl"):
            argv = train_flags(assets, tmp_path, tmp_path / name, images)
            assert train_pretrain_vlm.main(argv) == 1
            what = (
                "folder that holds no data file" if "folder" in name else "folder, FIFO or device"
            )
            assert f"{name} is a {what}" in capfd.readouterr().err
        argv = train_flags(assets, tmp_path, tmp_path / "pipe.txt", None)
        flags = dict(zip(argv[::2], argv[1::2], strict=True))
        kept = ("--tokenizer_path", "--save_dir", "--checkpoint_dir", "--data_path", "--device")
        assert train_llm.main([text for flag in kept for text in (flag, flags[flag])]) == 1
        assert "pipe.txt is a folder, FIFO or device" in capfd.readouterr().err
