"""Offers the cases about training on a GPU: no waiting for the device, every stage and size, equal
bits, speed.
"""

import itertools
import shutil
import signal
import time
import warnings
from contextlib import contextmanager
from functools import partial
from statistics import mean

import torch
from gpu.room import Case, Room, environment, waiting_is_an_error

from trainer.loop import train_loop
from trainer.loop.engine import Engine, autocast
from trainer.loop.optimizers import make_optimizer, set_trainable

MINUTE_S = 60
PROFILED_STEPS = (20, 10)  # before and during the profile
TOP_LINES = 15


def never_waits(room: Room, *, use_moe: bool, optimizer: str) -> str:
    """Forward, backward and update queue work; nothing asks the device for a result."""
    model, processor = room.model(use_moe=use_moe)
    set_trainable(model, freeze_llm=False)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    engine = Engine(
        model,
        optimizer=make_optimizer(named, lr=1e-4, kind=optimizer),
        scaler=torch.amp.GradScaler(room.device.type, enabled=False),
        grad_clip=1.0,
    )
    batch = room.batch(processor)
    dtype = room.dtypes[0]

    def step() -> torch.Tensor:
        with autocast(room.device, dtype):
            output = model(**batch.inputs_on(room.device))
        engine.backward(output.loss + output.aux_loss)
        sums = torch.stack((output.loss, output.aux_loss)).detach()
        engine.step(sums, is_empty=False)
        return output.loss.detach()

    first = step().item()  # loads kernels, which may wait
    with waiting_is_an_error(room.device):
        losses = [step() for _ in range(3)]
    last = losses[-1].item()
    assert last < first, f"loss {first} -> {last}"
    return f"{dtype}, loss {first:.3f} -> {last:.3f}"


def stage(room: Room, *, name: str, size: tuple[int, int], use_moe: bool, dtype: str) -> str:
    """A run of a few steps learns; none is left out, but that float16 first finds its scale."""
    if dtype not in room.dtypes:
        return f"refused: this GPU has no {dtype}"
    out = room.folder / "stage"
    hidden_size, num_layers = size
    try:
        lines = room.train(
            out,
            stage=name,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            use_moe=int(use_moe),
            dtype=dtype,
            freeze_llm=int(name == "pretrain"),
            learning_rate=0.02 if name == "pretrain" else 0.002,
            num_records=64,
        )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    assert len(losses) > len(lines) // 2, f"{len(lines)} steps, {len(losses)} losses"
    third = len(losses) // 3
    first, last = mean(losses[:third]), mean(losses[-third:])
    assert last < first, f"loss {first} -> {last}"
    skipped = lines[-1]["skipped_steps"]
    assert dtype == "float16" or not skipped, f"{skipped} steps left out"
    return f"loss {first:.3f} -> {last:.3f}, {lines[-1]['peak_gib']:.2f} GiB, {skipped} left out"


def resume(room: Room, *, use_moe: bool, dtype: str) -> str:
    """A run stopped in its middle and resumed ends with the bits of one that was not; if not by
    PyTorch's own kernels, then by deterministic ones, and those that differ are named."""
    if dtype not in room.dtypes:
        return f"refused: this GPU has no {dtype}"
    options = {"use_moe": int(use_moe), "dtype": dtype, "epochs": 2, "num_records": 16}
    found = differences(room, **options)
    if not found:
        return "equal bits by the usual kernels"
    with deterministic() as named:
        strict = differences(room, **options)
    assert not strict or named, f"differs without a kernel that may: {strict[:3]}"
    how = "equal bits by deterministic kernels" if not strict else f"differ too: {strict[0]}"
    return (
        f"usual kernels: {len(found)} tensors differ, {found[0]}; {how}; without a "
        f"deterministic form: {', '.join(sorted(named)) or 'none'}"
    )


def differences(room: Room, **options) -> list[str]:
    """Tensors of the state that differ between a whole run and a resumed one, and by how much."""
    whole, cut = room.folder / "whole", room.folder / "cut"
    try:
        room.train(whole, **options)
        with stopping_at(4):
            room.train(cut, status=128 + signal.SIGTERM, **options)
        room.train(cut, from_resume=1, **options)
        left, right = (
            torch.load(next((f / "checkpoints").glob("*_resume.pth")), weights_only=True)
            for f in (whole, cut)
        )
    finally:
        for folder in (whole, cut):
            shutil.rmtree(folder, ignore_errors=True)
    assert left["progress"] == right["progress"], "another progress"
    pairs = [(n, t, right["model"][n]) for n, t in left["model"].items()]
    for index, moments in left["optimizer"]["state"].items():
        others = right["optimizer"]["state"][index]
        pairs += [(f"{k} of parameter {index}", t, others[k]) for k, t in moments.items()]
    return [
        f"{name} by {(one - other).abs().max():.1e}"
        for name, one, other in pairs
        if not torch.equal(one, other)
    ]


@contextmanager
def stopping_at(step: int):
    """A run is sent SIGTERM in this step."""
    former = train_loop.optimizer_step

    def stepping(run, *rest):
        if run.progress.step == step - 1:
            run.stop.signum = signal.SIGTERM
        return former(run, *rest)

    train_loop.optimizer_step = stepping
    try:
        yield
    finally:
        train_loop.optimizer_step = former


@contextmanager
def deterministic():
    """Kernels that give the same bits each time; yields the names of those that have no such
    form, as they are met."""
    named: set[str] = set()

    def note(message, *_, **__):
        text = str(message)
        if "deterministic" in text:
            named.add(text.split(" ")[0])

    with environment(CUBLAS_WORKSPACE_CONFIG=":4096:8"), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield named
        finally:
            torch.use_deterministic_algorithms(False)


def minute(room: Room) -> str:
    """A minute at batch 64, with the profile's top lines."""
    left_s = max(5.0, room.deadline_s - time.monotonic() - 5)
    long_s = 3 if room.is_rehearsal else min(MINUTE_S, left_s)
    batch, num_records = (4, 48) if room.is_rehearsal else (64, 2048)
    before, during = (2, 2) if room.is_rehearsal else PROFILED_STEPS
    out = room.folder / "minute"
    try:
        with profiled(room, until_s=time.monotonic() + long_s, before=before, during=during):
            lines = room.train(
                out,
                stage="sft",
                num_records=num_records,
                batch_size=batch,
                epochs=1000,
                log_interval=2 if room.is_rehearsal else 10,
                num_workers=0 if room.is_rehearsal else 8,
                freeze_llm=0,
                save_interval=10**6,
                status=128 + signal.SIGTERM,
            )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    steady = lines[len(lines) // 3 :]  # without the start, and the profile in it
    figures = {
        k: mean(line[k] for line in steady)
        for k in ("tokens_per_s", "samples_per_s", "data_wait_pct")
    }
    peak = lines[-1]["peak_gib"]
    return (
        f"{lines[-1]['step']} steps of {batch}, {figures['tokens_per_s']:.0f} tokens/s, "
        f"{figures['samples_per_s']:.1f} samples/s, {figures['data_wait_pct']:.1f}% waiting for "
        f"data, peak {peak:.2f} GiB"
    )


@contextmanager
def profiled(room: Room, *, until_s: float, before: int, during: int):
    """Profile some steps of a run, and stop it at a time by `time.monotonic`."""
    kinds = torch.profiler.ProfilerActivity
    profile = torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if room.is_cuda else [kinds.CPU], acc_events=True
    )
    former, counter = train_loop.optimizer_step, itertools.count()

    def stepping(run, *rest):
        number = next(counter)
        if number == before:
            profile.start()
        if time.monotonic() > until_s and number > before + during:
            run.stop.signum = signal.SIGTERM
        result = former(run, *rest)
        if number == before + during - 1:
            room.synchronize()
            profile.stop()
            key = "self_cuda_time_total" if room.is_cuda else "self_cpu_time_total"
            table = profile.key_averages().table(
                sort_by=key, row_limit=TOP_LINES, max_name_column_width=60
            )
            room.details.append(f"profile of {during} steps\n{table}")
        return result

    train_loop.optimizer_step = stepping
    try:
        yield
    finally:
        train_loop.optimizer_step = former


def cases(room: Room) -> list[Case]:
    """What matters most first."""
    kinds = {"dense": False, "moe": True}
    found = [
        Case(
            f"no step waits: {kind}, {optimizer}",
            partial(never_waits, use_moe=use_moe, optimizer=optimizer),
        )
        for kind, use_moe in kinds.items()
        for optimizer in ("adamw", "muon")
    ]
    found += [
        Case(f"resume: {kind}, {dtype}", partial(resume, use_moe=use_moe, dtype=dtype))
        for kind, use_moe in kinds.items()
        for dtype in ("bfloat16", "float16", "float32")
    ]
    found.append(Case("a minute at batch 64", minute))
    found += [
        Case(
            f"{name} {size[0]}x{size[1]}: {kind}, {dtype}",
            partial(stage, name=name, size=size, use_moe=use_moe, dtype=dtype),
        )
        for size in room.sizes
        for dtype in ("bfloat16", "float16", "float32")
        for kind, use_moe in kinds.items()
        for name in ("pretrain", "sft")
    ]
    return found
