"""If this fails, `--lora_rank` trains other weights than its adapters, loses them on saving or on
resuming, or writes adapters that other programs do not read.
"""

import json
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from support.scripts import train_flags
from support.tiny_parts import TINY_MODEL, make_records

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import train_pretrain_vlm, train_sft_vlm
from trainer.loop import train_loop
from trainer.saving.lora import Lora

TRAINED = {"save_weight": "tuned", "learning_rate": 1e-2, "lora_rank": 4, "save_interval": 2}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def base(assets, tmp_path_factory):
    """Records, and a weight to start from."""
    folder = tmp_path_factory.mktemp("base")
    data, images = make_records(folder, num_records=16)
    argv = train_flags(assets, folder, data, images, freeze_llm=0, learning_rate=1e-2)
    assert train_pretrain_vlm.main(argv) == 0
    return data, images, next((folder / "out").glob("*.pth"))


def flags(assets, folder, base, **options):
    data, images, weight = base
    return train_flags(assets, folder, data, images, from_weight=weight, **TRAINED | options)


def saved(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_weight_is_the_base_plus_the_adapters(optimizer, assets, base, tmp_path, capsys):
    assert train_sft_vlm.main(flags(assets, tmp_path, base, optimizer=optimizer)) == 0
    assert "adapters of rank 4 on q_proj" in capsys.readouterr().out
    before, after = saved(base[2]), saved(tmp_path / "out" / "tuned_32.pth")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    is_due = {n for n in before if n.startswith("vision_proj.") or n.split(".")[-2] in ADAPTED}
    assert changed == is_due

    # The adapters are kept beside in the library's own format: read by it, they give the weight.
    folder = tmp_path / "out" / "tuned_32_lora"
    settings = LoraConfig(**json.loads((folder / "adapter_config.json").read_text()))
    factors = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    pair = [factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA"]
    assert pair[1].shape[0] == settings.r == 4
    update = settings.lora_alpha / settings.r * (pair[0] @ pair[1])
    torch.testing.assert_close(
        after[f"{name}.weight"].float(),
        before[f"{name}.weight"].float() + update,
        atol=1e-3,
        rtol=0,
    )


def test_a_resumed_run_has_equal_bits(assets, base, tmp_path, monkeypatch):
    ways = [flags(assets, tmp_path / name, base, epochs=2) for name in ("whole", "cut")]
    assert train_sft_vlm.main(ways[0]) == 0
    step, steps = train_loop.train_step, []

    def interrupted(run, share):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(run, share)

    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "train_step", interrupted)
        assert train_sft_vlm.main(ways[1]) != 0
    assert train_sft_vlm.main([*ways[1], "--from_resume", "1"]) == 0
    for place in ("out/tuned_32.pth", "checkpoints/tuned_32_resume.pth"):
        whole, cut = (saved(tmp_path / name / place) for name in ("whole", "cut"))
        whole, cut = whole.get("model", whole), cut.get("model", cut)
        assert all(torch.equal(whole[name], cut[name]) for name in whole), place
    assert any(".lora_A." in name for name in whole), "the state holds the adapters themselves"


def test_another_rank_does_not_resume_the_state(assets, base, tmp_path, capsys):
    argv = flags(assets, tmp_path, base)
    assert train_sft_vlm.main(argv) == 0
    assert train_sft_vlm.main([*argv, "--lora_rank", "8", "--from_resume", "1"]) == 1
    assert "--lora_rank" in capsys.readouterr().err


def test_unknown_matrices_are_refused(assets, base, tmp_path, capsys):
    assert train_sft_vlm.main(flags(assets, tmp_path, base, lora_targets="w1")) == 1
    err = capsys.readouterr().err
    assert "--lora_targets 'w1' is no matrix of a layer" in err and err.count("\n") == 1


def test_experts_take_no_adapters():
    """They are multiplied in stacks, past any adapter: it would train nothing, silently."""
    experts = MiniMindForCausalLM(MiniMindConfig(**TINY_MODEL, generation=3, use_moe=True))
    with pytest.raises(ValueError, match="experts, which take no adapters"):
        Lora(4, ("gate_proj",)).attach(experts)
    shared = MiniMindForCausalLM(MiniMindConfig(**TINY_MODEL, generation=2, use_moe=True))
    Lora(4, ("gate_proj",)).attach(shared)
    adapted = [name for name, _ in shared.named_parameters() if ".lora_A." in name]
    assert adapted and all(".shared_experts." in name for name in adapted)


def test_without_the_library_the_command_says_how_to_get_it(
    assets, base, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert train_sft_vlm.main(flags(assets, tmp_path, base)) == 1
    err = capsys.readouterr().err
    assert "pip install 'peft" in err and err.count("\n") == 1
