"""If this fails, many shards end in "Too many open files", or files stay open for nothing."""

import json
import os
import pickle
from contextlib import contextmanager

import pytest
from support.layouts import write_table
from support.tiny_parts import conversation

from dataset import convert
from dataset.examining.sources import Sources
from dataset.records import open_files
from dataset.records.mixing import parse_sources
from dataset.records.reader import open_records

resource = pytest.importorskip("resource", reason="this system limits no descriptors")


def num_open() -> int:
    return len(os.listdir("/dev/fd"))


@contextmanager
def few_descriptors():
    """Lets so many descriptors be open that a quarter of them is in use; gives that number."""
    before, used = resource.getrlimit(resource.RLIMIT_NOFILE), num_open()
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * used + 64, before[1]))
    try:
        yield used
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def make_shards(folder, num_shards):
    """One-row shards, each with its number as the answer."""
    folder.mkdir()
    for number in range(num_shards):
        turns = conversation("What?", f"{number}.")["conversations"]
        columns = {"conversations": [json.dumps(turns)], "image_bytes": [b""]}
        write_table(folder / f"{number:04}.parquet", columns)
    return folder


def make_finevision_shards(folder, num_shards):
    folder.mkdir()
    for number in range(num_shards):
        texts = [[{"user": "What?", "assistant": f"{number}."}]]
        write_table(folder / f"{number:04}.parquet", {"images": [[b""][:0]], "texts": texts})
    return folder


def answers_of(records) -> list[str]:
    return [records[i].messages[-1]["content"] for i in range(len(records))]


def test_all_sources_together_open_few_files(tmp_path):
    with few_descriptors() as used:
        num_shards = used + 40
        folders = [make_shards(tmp_path / name, num_shards) for name in "ab"]
        wanted = [f"{number}." for number in range(num_shards)] * 2
        mixed = open_records(parse_sources(list(map(str, folders))), None)
        assert answers_of(mixed) == answers_of(pickle.loads(pickle.dumps(mixed))) == wanted
        for paths in (folders, sorted(tmp_path.glob("*/*.parquet"))):
            sources = Sources(paths)
            assert not sources.faults and len(sources) == len(wanted)
            assert [sources.record(i).messages[-1]["content"] for i in (0, 1, -1 % len(wanted))]
        others = make_finevision_shards(tmp_path / "fine", num_shards)
        for paths in (folders, [others, folders[1]]):
            to = tmp_path / f"{paths[0].name}.jsonl"
            argv = [*map(str, paths), "--to", str(to), "--num_processes", "1"]
            assert convert.main(argv) == convert.DONE
            assert answers_of(open_records(to, None)) == wanted


def test_files_of_records_that_are_dropped_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(open_files, "MOST_OPEN", 3)
    before = num_open()
    records = open_records(make_shards(tmp_path / "a", 9), None)
    assert before < num_open() <= before + 2 * 3
    del records
    assert num_open() == before
    kept = [open_files.OpenedAtNeed(partial_number) for partial_number in (int, float, str, bytes)]
    assert [one.get() for one in kept] == [0, 0.0, "", b""] == [one.get() for one in kept]
