"""If this fails, the published file of a benchmark cannot be fetched, or another file is taken for
it.
"""

import hashlib
from dataclasses import replace

import pytest
from support.fake_hub import error_of, files_below, run

from dataset.evaluation.benchmarks import BENCHMARKS
from dataset.fetching.benchmark_files import FILES

CONTENT = b"index\tquestion\tA\tB\tanswer\timage\n"
PLACE = "dataset/benchmarks/MMStar.tsv"


@pytest.fixture
def stars(hub, monkeypatch):
    """A hub with a small MMStar."""
    hub.files["open/compass"]["MMStar.tsv"] = CONTENT
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(FILES, "mmstar", replace(FILES["mmstar"], md5=md5))
    return hub


def test_every_benchmark_has_a_file():
    assert FILES.keys() == BENCHMARKS.keys()
    assert len({file.md5 for file in FILES.values()}) == len(FILES)
    assert all(len(file.md5) == 32 for file in FILES.values())


def test_a_file_is_fetched_once_and_used(stars, tmp_path, capfd):
    assert run(tmp_path, "mmstar", "--dry_run") == 0 and not files_below(tmp_path)
    assert run(tmp_path, "mmstar") == 0
    assert (tmp_path / PLACE).read_bytes() == CONTENT
    told = capfd.readouterr().out
    assert f"eval_vlm.py --benchmark mmstar --data_path {tmp_path / PLACE}" in told
    assert "checked by md5" in told and "1 of unknown size" in told
    num = len(stars.requests)
    assert run(tmp_path, "mmstar") == 0 and len(stars.requests) == num
    assert files_below(tmp_path) == [PLACE]


def test_another_file_is_neither_kept_nor_written_over(stars, tmp_path, capfd):
    stars.corrupt.add("MMStar.tsv")
    assert "md5" in error_of(capfd, tmp_path, "mmstar") and not files_below(tmp_path)
    (tmp_path / PLACE).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / PLACE).write_bytes(b"mine")
    stars.corrupt.clear()
    assert "replace it by --force" in error_of(capfd, tmp_path, "mmstar")
    assert (tmp_path / PLACE).read_bytes() == b"mine"
    assert run(tmp_path, "mmstar", "--force") == 0
    assert (tmp_path / PLACE).read_bytes() == CONTENT


def test_a_file_that_is_gone_says_what_to_do(stars, tmp_path, capfd):
    told = error_of(capfd, tmp_path, "pope")
    assert "POPE.tsv" in told and "or name it by --data_path" in told
