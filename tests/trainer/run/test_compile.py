"""If this fails, `--compile` changes what is learnt, what is saved, or which samples follow."""

import shutil

import pytest
import torch
from support.scripts import train_flags
from support.states import saved
from support.tiny_parts import make_records
from torch._dynamo.utils import counters

from trainer import train_pretrain_vlm

TRAINED = {"freeze_llm": 0, "learning_rate": 1e-3, "save_interval": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("records"), num_records=16)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def weights_of(folder):
    return torch.load(next((folder / "out").glob("*.pth")), weights_only=True)


def train(assets, out, data, **flags):
    assert train_pretrain_vlm.main(train_flags(assets, out, *data, **(TRAINED | flags))) == 0
    return weights_of(out)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {},
        pytest.param({"use_moe": 1}, marks=pytest.mark.full),
        pytest.param({"pack": 1, "gradient_checkpointing": 1}, marks=pytest.mark.full),
        pytest.param({"lora_rank": 4}, marks=pytest.mark.full),
    ],
    ids=["dense", "moe", "packed-checkpointed", "lora"],
)
def test_same_steps_same_names(flags, assets, data, tmp_path):
    plain = train(assets, tmp_path / "plain", data, **flags)
    assert not counters["stats"]
    compiled = train(assets, tmp_path / "compiled", data, compile=1, **flags)
    assert 0 < counters["stats"]["unique_graphs"] <= 4  # one for all lengths and layers
    assert_close(compiled, plain)


@pytest.mark.full
def test_resumes_with_it_and_without(assets, data, tmp_path):
    whole = train(assets, tmp_path / "whole", data, epochs=2)
    for first, then in ((1, 0), (0, 1)):
        out = tmp_path / f"{first}{then}"
        train(assets, out, data, epochs=1, compile=first)
        state = saved(out / "checkpoints", "*_resume.pth")
        assert state["progress"]["epoch"] == 1
        found = train(assets, out, data, epochs=2, compile=then, from_resume=1)
        assert found.keys() == whole.keys()


def test_missing_compiler_is_told_before_anything_is_loaded(
    assets, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    argv = train_flags(assets, tmp_path, *data, use_compile=1, from_weight="absent")
    assert train_pretrain_vlm.main(argv) == 1
    assert "--compile 1 needs a C++ compiler" in capsys.readouterr().err


def test_deepspeed_is_refused(assets, data, tmp_path, capsys):
    argv = train_flags(assets, tmp_path, *data, compile=1, deepspeed="ds_zero2.json")
    assert train_pretrain_vlm.main(argv) == 1
    assert "--compile does not go with --deepspeed" in capsys.readouterr().err
