"""If this fails, `--compile` changes what is learnt, what is saved, or which samples follow."""

import shutil

import pytest
import torch
from support.scripts import run_script, train_flags
from support.states import saved
from support.tiny_parts import make_records
from torch import nn

from model.machine.compiling import compile_modules
from trainer import train_pretrain_vlm

TRAINED = {"freeze_llm": 0, "learning_rate": 1e-3, "save_interval": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("records"), num_records=16)


def train(assets, out, data, **flags):
    """Run the script; returns its weights, and whether it compiled anything."""
    kernels = out / "kernels"
    argv = train_flags(assets, out, *data, **(TRAINED | flags))
    env = {"TORCHINDUCTOR_CACHE_DIR": str(kernels)}
    run_script("trainer/train_pretrain_vlm.py", *argv, cold=True, env=env)
    weights = torch.load(next((out / "out").glob("*.pth")), weights_only=True)
    return weights, any(kernels.rglob("*.cpp"))


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_a_compiled_module_keeps_its_names_and_results():
    layer, rows = nn.Linear(3, 4), torch.randn(2, 3)
    names, expected = list(layer.state_dict()), layer(rows)
    compile_modules([layer])
    assert layer._compiled_call_impl is not None and list(layer.state_dict()) == names
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(layer(rows), expected)


@pytest.mark.full
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"use_moe": 1},
        {"pack": 1, "gradient_checkpointing": 1},
        {"lora_rank": 4},
    ],
    ids=["dense", "moe", "packed-checkpointed", "lora"],
)
def test_same_steps_same_names(flags, assets, data, tmp_path):
    plain, is_compiled = train(assets, tmp_path / "plain", data, **flags)
    assert not is_compiled
    found, is_compiled = train(assets, tmp_path / "compiled", data, compile=1, **flags)
    assert is_compiled
    assert_close(found, plain)


@pytest.mark.full
def test_resumes_with_it_and_without(assets, data, tmp_path):
    whole, _ = train(assets, tmp_path / "whole", data, epochs=2)
    for first, then in ((1, 0), (0, 1)):
        out = tmp_path / f"{first}{then}"
        train(assets, out, data, epochs=1, compile=first)
        state = saved(out / "checkpoints", "*_resume.pth")
        assert state["progress"]["epoch"] == 1
        found, is_compiled = train(assets, out, data, epochs=2, compile=then, from_resume=1)
        assert is_compiled  # in the first part or the second
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
