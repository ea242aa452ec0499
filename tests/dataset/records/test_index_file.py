"""If this fails, a kept index names other lines than the file has, is read when it is damaged, or
is written where nothing may be.
"""

import json
import os
import pickle
from pathlib import Path

import pytest
from support.tiny_parts import conversation

from dataset.records import index_file
from dataset.records.index_file import index_places, is_mapped
from dataset.records.json_array import PARSE_CHUNK_BYTES, index_array
from dataset.records.jsonl import WIDTH, JsonlRecords
from dataset.records.reader import open_records


@pytest.fixture(autouse=True)
def kept_for_any_size(monkeypatch, tmp_path):
    monkeypatch.setattr(index_file, "KEPT_FROM_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, answers) -> None:
    lines = [json.dumps(conversation("What?", answer)) for answer in answers]
    path.write_text("\n\n".join(lines) + "\n \n")


def answers_of(records) -> list[str]:
    return [records[i].messages[1]["content"] for i in range(len(records))]


def test_a_kept_index_is_read_until_the_file_changes(tmp_path, monkeypatch):
    path, made = tmp_path / "a.jsonl", []
    make = JsonlRecords._make_index
    monkeypatch.setattr(JsonlRecords, "_make_index", lambda self: made.append(1) or make(self))
    write(path, ["one", "two", "three"])
    beside, elsewhere = index_places(path)
    for _ in range(3):
        records = open_records(path, None)
        assert answers_of(records) == ["one", "two", "three"] and len(made) == 1
        assert [records.where(i) for i in range(3)] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5"]
        assert records.num_blank == 3 and is_mapped(JsonlRecords(path, None)._index)
        sent = pickle.dumps(records)
        assert len(sent) < 1_500 and answers_of(pickle.loads(sent)) == ["one", "two", "three"]
    assert beside.is_file() and not elsewhere.exists()
    write(path, ["one", "TWO", "four"])
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert answers_of(open_records(path, None)) == ["one", "TWO", "four"] and len(made) == 2
    assert list(tmp_path.glob(".a.jsonl.index*")) == [beside]


def test_a_damaged_index_is_made_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, ["one", "two"])
    open_records(path, None)
    beside, _ = index_places(path)
    whole = beside.read_bytes()
    one_row_less = whole[: -8 * WIDTH]  # its second record would be gone, silently
    for damaged in (
        one_row_less,
        whole[:-8],
        whole[:70],
        b"",
        b"x" * 200,
        whole[:20] + b"x" + whole[21:],
    ):
        beside.write_bytes(damaged)
        assert answers_of(open_records(path, None)) == ["one", "two"]
        assert beside.read_bytes() == whole


def test_a_folder_that_cannot_be_written_has_its_indexes_in_the_cache(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write(path, ["one", "two"])
    beside, elsewhere = index_places(path)
    beside.mkdir()  # in the way, as a folder without rights would be; root has all
    for _ in range(2):
        assert answers_of(open_records(path, None)) == ["one", "two"]
    assert elsewhere.is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # no place at all
    assert answers_of(open_records(path, None)) == ["one", "two"]


def test_a_user_without_a_home_has_indexes_beside_the_files(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    path = tmp_path / "a.jsonl"
    write(path, ["one", "two"])
    assert answers_of(open_records(path, None)) == ["one", "two"]
    assert [place.is_file() for place in index_places(path)] == [True]


def test_a_small_file_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.undo()
    write(tmp_path / "a.jsonl", ["one"])
    open_records(tmp_path / "a.jsonl", None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_elements_of_an_array_are_found_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.records.json_array.PARSE_CHUNK_BYTES", 7)
    assert PARSE_CHUNK_BYTES > 7
    values = [{"a": '图[{,"]}'}, 12345678901234, [], "é" * 30, -1.5e300, None, {"b": [[1], {}]}]
    path = tmp_path / "a.json"
    for text in (
        json.dumps(values),
        json.dumps(values, indent=3, ensure_ascii=False),
        "\ufeff \n" + json.dumps(values, ensure_ascii=False).replace(", ", " ,\r\n") + "\n\n",
    ):
        path.write_text(text, encoding="utf-8")
        data = path.read_bytes()
        found = [data[start : start + length] for start, length, _ in index_array(path)]
        assert [json.loads(one) for one in found] == values
    path.write_text(" [ ] ")
    assert len(index_array(path)) == 0
    with pytest.raises(ValueError, match="a.json: no records in it"):
        open_records(path, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}, {"a": ]', "at record 1 .*Expecting value"),
        ('[{"a": 1}, {"a": 2}', "at record 2 .*',' wanted, the end of the file found"),
        ('[{"a": 1} {"a": 2}]', "at record 1 .*',' wanted, '{' found"),
        ('[{"a": 1}]]', "at record 1 .*']' stands behind the end of the array"),
        ('[{"a": "\udce4"}]', "not UTF-8 .*save it as UTF-8"),
    ],
)
def test_a_broken_array_says_where(text, says, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=f"a.json: .*{says}") as caught:
        open_records(tmp_path / "a.json", None)
    assert "\n" not in str(caught.value)
