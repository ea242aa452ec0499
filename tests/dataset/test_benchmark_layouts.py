"""If this fails, layouts cannot be compared, or are compared by records that are not the same."""

import pytest
from support.tiny_parts import make_records

from dataset import benchmark_layouts
from dataset.benchmark_layouts import read_plain, write_layouts
from dataset.records.reader import open_records


def test_all_layouts_hold_the_same_records(tmp_path):
    data, images = make_records(tmp_path, num_records=10, multi=True)
    source = read_plain(open_records(data, images), 10)
    (tmp_path / "out").mkdir()
    for place in write_layouts(tmp_path / "out", source).values():
        assert read_plain(open_records(*place), 10) == source


def test_command_prints_a_line_of_each_layout(tmp_path, capsys):
    data, images = make_records(tmp_path, num_records=10)
    flags = ["--images_path", str(images), "--num_read", "20", "--rounds", "1"]
    assert benchmark_layouts.main([str(data), *flags, "--num_records", "6"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "6 records with 0.83 images; a CPU second reads" and len(lines) == 6
    assert all(line.endswith(" images") for line in lines)
    assert benchmark_layouts.main([str(tmp_path / "gone.jsonl")]) == 2
    assert "no data file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark_layouts.main([str(data), "--rounds", "0"])
