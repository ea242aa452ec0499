"""If this fails, training on a GPU differs from training on a CPU in more than rounding, or is
slowed by needless waits. Each GPU branch is checked on a CPU: by forcing it, or by looking at what
is called.
"""

import contextlib
import json
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.scripts import train_flags
from support.tiny_parts import TINY_MODEL, make_records
from support.tiny_vlm import make_loaded
from torch import nn

from dataset.collate import Batch, VLMCollator
from dataset.lm_dataset import BadSample, VLMDataset
from model.feed_forward import MoEFeedForward
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import train_pretrain_vlm
from trainer.loop.engine import Engine, lighten_tower, wrap_for_ranks
from trainer.loop.optimizers import make_optimizer, orthogonal
from trainer.loop.randomness import rng_state, set_rng_state
from trainer.loop.zero_engine import ZeroEngine
from trainer.ranks import meeting as rank_meeting
from trainer.ranks.group import Ranks
from trainer.ranks.signals import StopSignal
from trainer.run.build import Loaders
from trainer.run.setup import print_reason
from trainer.train_args import TrainArgs
from trainer.train_clip_tiny import PROCESSOR, preprocess

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
NAMES = ("input_ids", "labels", "attention_mask", "image_mask")


def figures_of(folder) -> list[dict]:
    return [json.loads(line) for line in next(folder.rglob("*_metrics.jsonl")).open()]


def weights_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(next(folder.rglob("*_resume.pth")), weights_only=True)["model"]


def test_every_batch_for_a_gpu_has_a_length_of_a_multiple_of_64(assets, tmp_path):
    processor = make_loaded(assets).processor
    dataset = VLMDataset(*make_records(tmp_path, multi=True), processor)
    args = TrainArgs(batch_size=3, num_workers=0, seed=1)
    for device, multiple in ((CPU, 1), (GPU, 64)):
        ranks = Ranks(0, 1, device)
        made = Loaders(args, ranks, StopSignal(), 0)
        for loader in (made.train(dataset, 0, 0), made.validation(dataset)):
            loader._batches.pin_memory = False  # there is no GPU to pin for
            shapes = {batch.inputs[name].shape for (batch,) in loader for name in NAMES}
            lengths = {shape[1] for shape in shapes}
            assert all(length % multiple == 0 for length in lengths)
            assert lengths and lengths <= {64, 128} or multiple == 1
    blank = VLMCollator(pad_token_id=0, pad_multiple=64)([BadSample(0, "broken")]).inputs
    assert all(blank[name].shape == (1, 64) for name in NAMES)


@pytest.mark.parametrize("use_moe", [0, 1])
def test_longer_padding_trains_the_same(use_moe, assets, tmp_path, monkeypatch):
    data = make_records(tmp_path / "data", num_records=8, multi=True)
    val = {"val_data_path": data[0], "val_images_path": data[1]}
    monkeypatch.setattr("trainer.run.report.draw_curves", lambda _paths: None)
    for name, multiple in (("plain", 1), ("padded", 64)):
        monkeypatch.setattr("trainer.run.build.pad_multiple", lambda _device, m=multiple: m)
        argv = train_flags(assets, tmp_path / name, *data, use_moe=use_moe, **val)
        assert train_pretrain_vlm.main(argv) == 0
    for plain, padded in zip(*(figures_of(tmp_path / n) for n in ("plain", "padded")), strict=True):
        for key in plain.keys() & {"loss", "aux_loss", "val_loss", "grad_norm", "val_tokens"}:
            assert padded[key] == pytest.approx(plain[key], rel=1e-5), key
    plain, padded = (weights_of(tmp_path / name) for name in ("plain", "padded"))
    for name, weight in plain.items():
        torch.testing.assert_close(padded[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("device, is_safe", [("cpu", False), ("mps", False), ("cuda:0", True)])
def test_copies_wait_where_their_source_may_change(device, is_safe):
    waits = []

    class Recorded(torch.Tensor):
        def to(self, _device, *, non_blocking=False):
            waits.append(non_blocking)
            return self

    inputs = {"input_ids": torch.zeros(1, 2).as_subclass(Recorded), "pixel_values": None}
    Batch(inputs, 1, 1, 1, 2, []).inputs_on(torch.device(device))
    assert waits == [is_safe]


class DirtyGroups(torch.autograd.Function):
    """`grouped_mm` as GPUs have it: nothing is written where an expert has no row."""

    @staticmethod
    def forward(ctx, rows, weights, ends):
        ctx.save_for_backward(rows, weights, ends)
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return torch.cat([r @ w for r, w in zip(rows.split(counts), weights, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        rows, weights, ends = ctx.saved_tensors
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        parts = list(zip(rows.split(counts), grad.split(counts), weights, strict=True))
        dirty = torch.full_like(weights[0], math.nan)
        of_weights = [r.mT @ g if len(r) else dirty for r, g, _ in parts]
        return torch.cat([g @ w.mT for _, g, w in parts]), torch.stack(of_weights), None


@pytest.mark.parametrize("route", ["grouped", "dirty", "every_expert"])
def test_expert_without_a_row_gets_a_zero_gradient(route, monkeypatch):
    is_grouped = route != "every_expert"
    monkeypatch.setattr("model.feed_forward.has_grouped_mm", lambda *_: is_grouped)
    if route == "dirty":
        monkeypatch.setattr(F, "grouped_mm", lambda a, b, *, offs: DirtyGroups.apply(a, b, offs))
    torch.manual_seed(0)
    layer = MoEFeedForward(MiniMindConfig(**TINY_MODEL, use_moe=True, num_experts_per_tok=1))
    with torch.no_grad():
        layer.gate.weight.copy_(torch.randn_like(layer.gate.weight))
    hidden = torch.randn(1, 1, 32).expand(1, 3, 32)  # one and the same token three times
    chosen = int(layer.gate(hidden, None)[0][0, 0])
    layer(hidden, None)[0].pow(2).sum().backward()
    for index, expert in enumerate(layer.experts):
        for name, parameter in expert.named_parameters():
            assert parameter.grad.isfinite().all(), (index, name)
            assert parameter.grad.any() == (index == chosen), (index, name)


def test_experts_of_odd_widths_train_in_bfloat16():
    """Grouped products refuse rows that are no multiple of 16 bytes."""
    config = MiniMindConfig(
        hidden_size=20,
        num_attention_heads=5,
        num_key_value_heads=5,
        num_hidden_layers=1,
        use_moe=True,
    )
    model = MiniMindForCausalLM(config).train()
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_step_that_is_not_finite_is_left_out_where_kernels_do_not_heed_it(kind, monkeypatch):
    monkeypatch.setattr("trainer.loop.engine.heeds_found_inf", lambda _device: False)
    model = nn.Linear(4, 3)
    optimizer = make_optimizer(model.named_parameters(), lr=0.1, kind=kind)
    step = optimizer.step

    def deaf() -> None:
        del optimizer.found_inf
        step()

    optimizer.step = deaf  # as the kernels of MPS are
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    engine = Engine(model, optimizer=optimizer, scaler=scaler, grad_clip=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    for factor in (math.nan, 1.0):
        engine.backward(model(torch.ones(2, 4)).sum() * factor)
        _, is_bad = engine.step(torch.ones(2), is_empty=False)
        assert bool(is_bad) == math.isnan(factor)
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert same == [math.isnan(factor)] * 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_muon_in_bfloat16_turns_as_it_does_in_float32(monkeypatch):
    torch.manual_seed(0)
    matrices = torch.randn(3, 48, 16)
    exact, rough = orthogonal(matrices), orthogonal(matrices, dtype=torch.bfloat16)
    assert (exact.dtype, rough.dtype) == (torch.float32, torch.bfloat16)
    cosine = F.cosine_similarity(exact.flatten(1), rough.float().flatten(1))
    assert cosine.min() > 0.999 and (exact - rough.float()).norm() / exact.norm() < 0.03

    dtypes = []
    monkeypatch.setattr("trainer.loop.optimizers.product_dtype", lambda _device: torch.bfloat16)
    monkeypatch.setattr(
        "trainer.loop.optimizers.orthogonal",
        lambda m, *, dtype: dtypes.append(dtype) or orthogonal(m),
    )
    model = nn.Linear(4, 3)
    model(torch.ones(1, 4)).sum().backward()
    make_optimizer(model.named_parameters(), lr=0.1, kind="muon").step()
    assert dtypes == [torch.bfloat16] and model.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tower_kept_in_low_precision_computes_the_same_bits(dtype, assets):
    model = make_loaded(assets).model
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        before = model.get_image_embeddings(pixels, model.vision_encoder)
        lighten_tower(model, dtype)
        after = model.get_image_embeddings(pixels, model.vision_encoder)
    assert torch.equal(before, after)
    dtypes = {
        type(m).__name__: p.dtype
        for m in model.vision_encoder.modules()
        for p in m.parameters(recurse=False)
    }
    assert dtypes["Linear"] == dtypes["Conv2d"] == getattr(torch, dtype)
    assert dtypes["LayerNorm"] == dtypes["Embedding"] == torch.float32
    assert next(model.vision_proj.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_casts_the_towers_weights_once(dtype, assets, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr("trainer.run.setup.train", lambda run: runs.append(run) or False)
    argv = train_flags(assets, tmp_path, *make_records(tmp_path / "data"), dtype=dtype)
    assert train_pretrain_vlm.main(argv) == 128
    tower = runs[0].engine.model.vision_encoder
    kinds = {m.weight.dtype for m in tower.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert kinds == {getattr(torch, dtype)}


def test_generators_are_those_of_the_runs_own_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_rng_state", lambda device: asked.append(device) or torch.ones(2)
    )
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda _state, device: asked.append(device))
    set_rng_state(rng_state(GPU), GPU)
    assert asked == [GPU, GPU]
    state = rng_state(CPU)
    set_rng_state(state, GPU)  # a run that went on from a CPU has no state for it
    assert asked == [GPU, GPU] and "cuda" not in state


def test_copy_for_validation_touches_no_other_gpus_generator(monkeypatch):
    forks, fork = [], torch.random.fork_rng
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda *a, **k: forks.append((a, k)) or fork(*a, **k)
    )
    engine = ZeroEngine.__new__(ZeroEngine)
    engine._ranks, engine._tower = Ranks(0, 1, CPU), None
    engine.module = MiniMindForCausalLM(MiniMindConfig(**TINY_MODEL))
    engine._gather = contextlib.nullcontext
    copy = engine._whole_copy()
    assert torch.equal(copy.lm_head.weight, engine.module.lm_head.weight)
    assert forks == [((), {"devices": []})]


@pytest.fixture
def alone():
    """A process group of one, over gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_of_several_ranks_lie_in_the_buckets_that_travel(alone):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    wrapped = wrap_for_ranks(model, Ranks(0, 2, CPU))
    for _ in range(2):  # gradients that were set to None are views again
        wrapped(torch.ones(2, 4)).sum().backward()
        places = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(places) == 1
        wrapped.zero_grad(set_to_none=True)


def test_nccl_is_given_its_device_and_fails_in_one_line(monkeypatch):
    asked = []

    def connect(backend, **options):
        asked.append((backend, options["device_id"]))
        raise RuntimeError(
            "NCCL error in: ProcessGroupNCCL.cpp:1, invalid usage, NCCL version 2.27\n"
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
            "Last error:\nDuplicate GPU detected\nException raised from x at y.cpp:1 (most recent"
        )

    store = dist.HashStore()
    monkeypatch.setattr(rank_meeting, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", connect)
    monkeypatch.setattr(rank_meeting, "CONNECT_TRIES", 1)
    with pytest.raises(ConnectionError) as told:
        rank_meeting.join_process_group(
            "cpu:gloo,cuda:nccl", timeout=timedelta(seconds=9), device=GPU
        )
    assert asked == [("cpu:gloo,cuda:nccl", GPU)]
    assert "\n" not in str(told.value) and "Duplicate GPU detected; see" in str(told.value)


def test_nccl_failure_in_a_step_is_one_line(capsys):
    error = dist.DistBackendError("NCCL communicator was aborted on rank 1.\nException raised")
    assert print_reason(error, lost=None) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "NCCL communicator was aborted on rank 1" in line and "--from_resume 1" in line


def test_pictures_are_scaled_on_a_gpu_in_floating_point(monkeypatch):
    """No GPU scales 8-bit numbers smoothly; the result is that of 8 bits all the same."""
    pictures = torch.randint(
        0, 256, (2, 3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    one_of_255 = 1 / (255 * min(PROCESSOR.image_std))
    exact, floating = preprocess(pictures), preprocess(pictures.float())
    assert (exact - floating).abs().max() <= 2.01 * one_of_255
    assert (exact != floating).float().mean() < 1e-2
    given, scale = [], F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda x, **options: given.append(x.dtype) or scale(x, **options)
    )
    preprocess(pictures.to("meta"))  # stands for any device that is no CPU
    preprocess(pictures)
    assert given == [torch.float32] * 2 + [torch.uint8] * 2


def test_validation_needs_no_float64_on_the_device(assets, tmp_path, monkeypatch):
    """MPS has none."""

    def refuse(*_):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch.Tensor, "double", refuse)
    data = make_records(tmp_path / "data", num_records=4)
    val = {"val_data_path": data[0], "val_images_path": data[1]}
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, *data, **val)) == 0
    assert any("val_loss" in figures for figures in figures_of(tmp_path))
