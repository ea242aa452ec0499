"""If this fails, a broken data set ends the doctor or the conversion in a traceback, or never, or
the doctor calls a record good that is broken, or broken that is good.
"""

import json
import shutil

import pytest
from support.data_fuzz import bad_records, break_set, good_answers, make_whole
from support.scripts import within_s

from dataset import convert, doctor

CASES = 540
SHORT = 36
PATIENCE_S = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "set"
    make_whole(folder)
    return folder


def run_case(case: int, whole, folder, assets) -> None:
    kind, data, images = break_set(whole, folder, case)
    if kind in ("array", "table", "shards"):
        arguments = [str(data), "--to", str(folder / "o.jsonl"), "--num_processes", "1"]
        arguments += ["--images_path", str(images)] if images else []
        with within_s(PATIENCE_S):
            status = convert.main(arguments)
        expected, made = good_answers(kind, data, images), folder / "o.jsonl"
        if expected is None:
            assert status in (1, 2)
            return
        lines = made.read_text().splitlines() if made.exists() else []
        records = [json.loads(line) for line in lines]
        found = [
            [turn["content"] for turn in one["conversations"] if turn["role"] == "assistant"]
            for one in records
        ]
        assert found == expected, (kind, status)
        return
    arguments = [
        str(data), "--faults", str(folder / "f.jsonl"), "--num_workers", "0",
        "--tokenizer_path", str(assets / "tokenizer"), "--vision_model_path", str(assets / "tower"),
        *(["--images_path", str(images)] if images else []),
    ]  # fmt: skip
    with within_s(PATIENCE_S):
        status = doctor.main(arguments)
    expected = bad_records(data, images)
    if expected is None:
        assert status in (1, 2)
        return
    faults = (folder / "f.jsonl").read_text().splitlines() if status < 2 else []
    found = {json.loads(line)["where"].removeprefix(f"{data}:") for line in faults}
    assert found == expected and status == bool(expected) or found == {str(data)}, (kind, found)


def run_cases(cases: range, whole, tmp_path, assets, capsys) -> None:
    for case in cases:
        folder = tmp_path / "case"
        try:
            run_case(case, whole, folder, assets)
        except BaseException as error:
            raise AssertionError(f"case {case}: {capsys.readouterr()}") from error
        shutil.rmtree(folder)


def test_broken_sets_are_faults(whole, tmp_path, assets, capsys):
    run_cases(range(SHORT), whole, tmp_path, assets, capsys)


@pytest.mark.full
@pytest.mark.parametrize("start", range(SHORT, CASES, 84))
def test_many_broken_sets_are_faults(start, whole, tmp_path, assets, capsys):
    run_cases(range(start, min(start + 84, CASES)), whole, tmp_path, assets, capsys)
