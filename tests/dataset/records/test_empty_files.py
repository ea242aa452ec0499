"""If this fails, a shard without records among others stops a run, or is passed over unsaid."""

import json

import pyarrow
import pytest
from support.layouts import write_tar
from support.scripts import train_flags
from support.tiny_parts import conversation, make_records

from dataset import convert, doctor
from dataset.records.address import Address, StreamOptions
from dataset.records.mixing import parse_sources
from dataset.records.reader import open_records
from trainer import train_sft_vlm

TURNS = json.dumps(conversation("What?", "A circle."))


def write_shard(path, *, is_empty):
    if path.suffix == ".parquet":
        turns = json.dumps(json.loads(TURNS)["conversations"])
        table = pyarrow.table({"conversations": [turns] * 3, "image_bytes": pyarrow.nulls(3)})
        pyarrow.parquet.write_table(table.slice(0, 0) if is_empty else table, path)
    elif path.suffix == ".tar":
        write_tar(path, [] if is_empty else [(f"{n}.json", TURNS.encode()) for n in range(3)])
    else:
        path.write_text("\n \n" if is_empty else f"{TURNS}\n" * 3)


def make_folder(folder, suffix, empty):
    folder.mkdir()
    for number, is_empty in enumerate(empty):
        write_shard(folder / f"{number}.{suffix}", is_empty=is_empty)
    return folder


@pytest.mark.parametrize("suffix", ["parquet", "tar", "jsonl"])
def test_empty_files_are_passed_over(suffix, tmp_path, capsys):
    folder = make_folder(tmp_path / "a", suffix, [True, False, True])
    says = f"2 file(s) without a record are passed over: 0.{suffix}, 2.{suffix}"
    for records in (open_records(folder, None), open_records(parse_sources([f"{folder}:1"]), None)):
        assert len(records) == 3 and records[2].messages and records.emptiness == says
    stream = open_records(Address(f"file://{folder}/*"), None, stream=StreamOptions(cache=tmp_path))
    assert len(stream) == 3 and [stream[i].messages for piece in stream.ids(0, 0) for i in piece]
    assert f"{folder}/2.{suffix}: no records in it; passed over" in capsys.readouterr().err
    whole = open_records(make_folder(tmp_path / "b", suffix, [False]), None)
    assert whole.emptiness is None
    nothing = make_folder(tmp_path / "c", suffix, [True, True])
    for data in (nothing, nothing / f"0.{suffix}", Address(f"file://{nothing}/*")):
        with pytest.raises(ValueError, match="no records in it"):
            open_records(data, None, stream=StreamOptions(cache=tmp_path))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_conversion_passes_over_empty_files(suffix, tmp_path, capsys):
    folder = make_folder(tmp_path / "a", suffix, [True, False])
    argv = [str(folder), "--num_processes", "1", "--to"]
    assert convert.main([*argv, str(tmp_path / "a.parquet")]) == convert.DONE
    says = f"warning: 1 file(s) without a record are passed over: 0.{suffix}"
    assert says in capsys.readouterr().err and len(open_records(tmp_path / "a.parquet", None)) == 3
    (folder / f"1.{suffix}").unlink()
    assert convert.main([*argv, str(tmp_path / "b.parquet")]) == convert.FAULTY
    assert "no records in it" in capsys.readouterr().out


def test_a_stream_whose_first_shards_are_empty_is_estimated_by_a_later_one(tmp_path):
    empty = [True] * 30
    empty[17] = False
    folder = make_folder(tmp_path / "a", "jsonl", empty)
    (folder / "3.jsonl").write_bytes(b"")
    options = StreamOptions(cache=tmp_path, window=2)
    records = open_records(Address(f"file://{folder}/*.jsonl"), None, stream=options)
    assert len(records) and len(records[records.first_ids(9)[0]].messages) == 2


def test_training_and_doctor_say_what_is_passed_over(assets, tmp_path, capfd):
    data, images = make_records(tmp_path / "data", num_records=4)
    (tmp_path / "data" / "empty.jsonl").write_text("\n")
    says = "warning: 1 file(s) without a record are passed over: empty.jsonl"
    assert train_sft_vlm.main(train_flags(assets, tmp_path, data.parent, images)) == 0
    assert says in capfd.readouterr().err
    own = ["--tokenizer_path", assets / "tokenizer", "--vision_model_path", assets / "tower"]
    argv = [data.parent, "--images_path", images, "--num_workers", 0, *own]
    assert doctor.main(list(map(str, argv))) == doctor.CLEAN and says in capfd.readouterr().err
