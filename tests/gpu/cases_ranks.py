"""Offers the cases about several processes on one GPU: two over gloo, one over nccl."""

import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from gpu.room import Case, Room, Skip, read_metrics

TESTS = Path(__file__).resolve().parents[1]
TIMEOUT_S = 120
# A rank as `torchrun` starts it. Two ranks share a GPU where each thinks itself alone on its
# machine, and only gloo carries between them then: nccl refuses two on one GPU.
RANK = """
import sys
import torch.distributed as dist
if sys.argv[1] == "gloo":
    dist.is_nccl_available = lambda: False
from trainer import report, train_pretrain_vlm
report.draw_curves = lambda paths: None
status = train_pretrain_vlm.main(sys.argv[2:])
sys.exit(status)
"""


def run_ranks(room: Room, *, world_size: int, backend: str, out: Path, **options) -> list[dict]:
    """Train on several ranks; returns the run's metrics."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
    }
    command = [sys.executable, "-c", RANK, backend, *room.flags(out, **options)]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        said = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [text[-2000:] for rank, text in zip(ranks, said, strict=True) if rank.returncode]
    assert not failed, "\n".join(failed)
    return read_metrics(out)


def gloo(room: Room) -> str:
    """Two ranks learn what one does with the same batch."""
    one, two = room.folder / "one", room.folder / "two"
    options = {"num_records": 16, "dtype": "float32"}
    try:
        alone = room.train(one, batch_size=4, **options)
        shared = run_ranks(room, world_size=2, backend="gloo", out=two, batch_size=2, **options)
    finally:
        for folder in (one, two):
            shutil.rmtree(folder, ignore_errors=True)
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(alone, shared, strict=True))
    assert worst < 1e-2, f"losses differ by {worst:.1e}"
    return f"losses differ by {worst:.1e} at most"


def nccl(room: Room) -> str:
    """One rank over nccl, as torchrun starts it."""
    if room.is_cuda and not dist.is_nccl_available():
        raise Skip("this PyTorch has no nccl")
    out = room.folder / "nccl"
    try:
        lines = run_ranks(
            room, world_size=1, backend="nccl" if room.is_cuda else "gloo", out=out, num_records=16
        )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    version = ".".join(map(str, torch.cuda.nccl.version())) if room.is_cuda else "gloo instead"
    return f"{version}, loss {lines[0]['loss']:.3f} -> {lines[-1]['loss']:.3f}"


def cases(room: Room) -> list[Case]:
    return [
        Case("two ranks on one GPU over gloo", partial(gloo)),
        Case("one rank over nccl", partial(nccl)),
    ]
