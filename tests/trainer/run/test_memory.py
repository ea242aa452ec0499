"""If this fails, a run that is said to fit ends for want of memory."""

import pytest
import torch
from support.scripts import train_flags
from support.tiny_parts import make_records
from torch.profiler import ProfilerActivity, profile

from trainer import train_pretrain_vlm
from trainer.loop.steps import shares_of
from trainer.loop.train_loop import train_step
from trainer.run import setup
from trainer.run.memory import StepShape, estimate_step

WIDE = {"freeze_llm": 0, "hidden_size": 128, "num_hidden_layers": 3, "batch_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("records"), num_records=32)


def peak_of(profiler) -> int:
    """Bytes at the fullest moment, of what was allocated since the start."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "flags",
    [
        {},
        pytest.param({"dtype": "bfloat16", "accumulation_steps": 2}, marks=pytest.mark.full),
        pytest.param({"use_moe": 1, "optimizer": "muon"}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": 1, "dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param({"freeze_llm": 1}, marks=pytest.mark.full),
        pytest.param({"lora_rank": 4}, marks=pytest.mark.full),
        pytest.param({"cache_vision_features": 1}, marks=pytest.mark.full),
    ],
    ids=["dense", "bfloat16", "moe-muon", "checkpointed", "projection", "lora", "cached"],
)
def test_estimate_is_within_15_percent(flags, assets, data, tmp_path, monkeypatch):
    found = []

    def measure(run):
        shares = shares_of(run.batches(0, 0), run.args.accumulation_steps)
        share = next(shares)
        train_step(run, share)  # the optimizer's states are there afterwards
        share = next(shares)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train_step(run, share)
        batch = max(share.batches, key=lambda batch: batch.inputs["input_ids"].numel())
        size, num_tokens = batch.inputs["input_ids"].shape
        model, args = run.engine.module, run.args
        pixels = batch.inputs["pixel_values"]
        shape = StepShape(
            size,
            num_tokens,
            -(-batch.num_supervised // size),
            None if pixels is None else pixels.shape[-1],
        )
        estimate = estimate_step(
            model,
            shape,
            device=run.device,
            dtype=args.dtype,
            optimizer=args.optimizer,
            keeps_gradients=args.accumulation_steps > 1,
        )
        found.append((estimate, peak_of(profiler), model, run.engine.optimizer))
        shares.close()
        return True

    monkeypatch.setattr(setup, "train", measure)
    argv = train_flags(assets, tmp_path, *data, **(WIDE | flags))
    assert train_pretrain_vlm.main(argv) == 0
    estimate, peak, model, optimizer = found[0]
    assert estimate.gradients + estimate.activations == pytest.approx(peak, rel=0.15)
    sizes = {
        name: sum(p.numel() * p.element_size() for n, p in named if is_of(n))
        for named in [[*model.named_parameters(), *model.named_buffers()]]
        for name, is_of in (
            ("tower", lambda n: n.startswith("vision_encoder.")),
            ("weights", lambda n: not n.startswith("vision_encoder.")),
        )
    }
    states = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    assert (estimate.tower, estimate.weights) == (sizes["tower"], sizes["weights"])
    assert estimate.optimizer == pytest.approx(states, rel=0.01)


def test_run_says_what_takes_memory(assets, data, tmp_path, capfd, monkeypatch):
    """Where it is more than a gigabyte, by its parts."""
    flags = WIDE | {"batch_size": 64, "hidden_size": 512, "num_hidden_layers": 2}
    argv = train_flags(assets, tmp_path, *data, **flags)
    monkeypatch.setattr(setup, "train", lambda run: True)
    assert train_pretrain_vlm.main(argv) == 0
    line = next(
        x for x in capfd.readouterr().out.splitlines() if x.startswith("estimated memory: ")
    )
    for part in ("weights", "optimizer", "activations"):
        assert f"{part} 0." in line
