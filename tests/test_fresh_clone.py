"""If this fails, `python web_demo.py` in a fresh clone does not start with what is there, or does
so without a word.
"""

import os
import shutil

import pytest
from support.scripts import ROOT

import web_demo
from model.weights import file_names
from model.weights.file_names import find_weight, weight_at_hand

DEMO = "sft_vlm_demo_128"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the finished weights of the repository, in place of `out/`."""
    for name in (f"{DEMO}.pth", f"{DEMO}.json", "llm_demo_128.pth"):
        shutil.copy(ROOT / "out" / name, tmp_path)
    for module in (file_names, web_demo):
        monkeypatch.setattr(module, "OUT_DIR", tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch) -> list:
    """What was served, instead of serving it."""
    seen = []
    monkeypatch.setattr(web_demo, "serve_api", lambda engine, *_, **__: seen.append(engine) or 0)
    monkeypatch.setattr(
        web_demo,
        "serve_page",
        lambda weights, *_, **__: seen.append(weights.get(weights.default)) or 0,
    )
    return seen


@pytest.mark.parametrize("flags", [[], ["--api"]], ids=["page", "api"])
def test_demo_model_is_taken_where_there_is_no_other(clone, started, capsys, flags):
    assert web_demo.main([*flags, "--save_dir", str(clone), "--device", "cpu"]) == 0
    (engine,) = started
    assert engine.path.stem == DEMO and engine.can_see
    told = capsys.readouterr().err
    assert "there is no weight sft_vlm yet, so this starts with sft_vlm_demo_128.pth" in told
    assert "the finished tiny model of this repository" in told and told.count("\n") == 1


def test_named_weight_is_never_replaced_and_its_message_names_what_there_is(clone, started, capsys):
    for flags in (["--weight", "sft_vlm"], ["--hidden_size", "512"], ["--weight", "gone/x.pth"]):
        assert web_demo.main([*flags, "--save_dir", str(clone), "--device", "cpu"]) == 1
        told = capsys.readouterr().err
        assert told.startswith("error: no weight") and told.count("\n") == 1
        assert "llm_demo_128.pth, sft_vlm_demo_128.pth" in told
    assert started == []


def test_what_is_taken_is_the_newest_of_the_kind(clone):
    assert weight_at_hand("sft_vlm", save_dir=clone).stem == DEMO
    assert weight_at_hand("pretrain_vlm", save_dir=clone) is None
    mine = clone / "mine"
    mine.mkdir()
    for age_s, name in ((10, "sft_vlm_old_64.pth"), (5, "sft_vlm_new_64.pth")):
        (mine / name).touch()
        os.utime(mine / name, (10**9 - age_s, 10**9 - age_s))
    assert weight_at_hand("sft_vlm", save_dir=mine).name == "sft_vlm_new_64.pth"
    (clone / "sft_vlm_768.pth").touch()  # there after all: `find_weight` takes it
    assert weight_at_hand("sft_vlm", save_dir=clone) is None
    found = find_weight("sft_vlm", save_dir=clone, hidden_size=None, use_moe=None)
    assert found.name == "sft_vlm_768.pth"


def test_origins_of_pages_are_of_the_api_alone(capsys):
    assert web_demo.main(["--cors", "http://localhost:3000"]) == 1
    assert "error: --cors is of the server for programs; add --api" in capsys.readouterr().err
    assert web_demo.main(["--api", "--cors", "localhost"]) == 1
    assert "--cors localhost is no origin" in capsys.readouterr().err
