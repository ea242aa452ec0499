"""Owns the group of ranks: this process's rank and device, and the collectives over all ranks."""

import itertools
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from model.machine.device import check_dtype, choose_device, memory_guard, prepare_device
from model.machine.heap import keep_freed_memory
from trainer.ranks.meeting import join_process_group

Item = TypeVar("Item")
# A save or a slow first batch must fit; ranks that died are noticed long before (watch.py).
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def is_main_process() -> bool:
    """True for the one rank that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def Logger(content: str) -> None:  # noqa: N802, the name that users of the original know
    """Print a line, on the main process only."""
    if is_main_process():
        print(content, flush=True)


def warn(content: str) -> None:
    """Print a warning to stderr, on the main process only."""
    if is_main_process():
        print(f"warning: {content}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Ranks:
    """This process's rank among all, and its device."""

    rank: int
    world_size: int
    device: torch.device

    def host_sum(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over all ranks on the host, without touching the device."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def gather(self, value: Item) -> list[Item]:
        """A small object of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def batches(self, items: Iterable[Item], size: int) -> Iterator[list[Item]]:
        """This rank's batches of items; the batches are the same for any number of ranks."""
        source = iter(items)
        for number in itertools.count():
            batch = list(itertools.islice(source, size))
            if not batch:
                return
            if number % self.world_size == self.rank:
                yield batch

    def collect(self, work: Callable[[], list[Item]]) -> list[Item]:
        """The results of every rank's work, in the order of the ranks, on all of them.

        Raises:
            ValueError, OSError: what any of them raised.
        """
        share: list[Item] = []
        failure: Exception | None = None
        try:
            with memory_guard("lower --batch_size"):
                share = work()
        except (ValueError, OSError) as error:
            failure = error
        shares = self.gather((share, failure))
        for _, problem in shares:
            if problem is not None:
                raise problem
        return [item for found, _ in shares for item in found]

    def from_first(self, value: Item) -> Item:
        """Rank 0's small object, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def device_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks on the device, in place and without waiting."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


def init_distributed_mode(
    device: str | None = None,
    dtype: str = "float32",
    *,
    tf32: bool = False,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> Ranks:
    """Choose and prepare this process's device, and join the process group of torchrun or
    deepspeed, if one of them started this process.

    Where several processes run on a machine, each takes the GPU of its local rank; the index in
    `device` counts only where there is one process.

    Args:
        tf32: see `prepare_device`.
    Raises:
        ValueError: the device is not there, or cannot do this.
    """
    is_distributed = "RANK" in os.environ
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if is_distributed else 1
    local_rank, num_local = local_ranks()
    chosen, backend = resolve_compute(
        device,
        dtype,
        local_rank=local_rank if num_local > 1 else None,
        is_shared=world_size > 1,
    )
    prepare_device(chosen, tf32=tf32)
    if chosen.type == "cpu":
        keep_freed_memory()
    if not is_distributed:
        return Ranks(0, 1, chosen)
    if os.name == "nt":  # PyTorch for Windows is built without libuv
        os.environ["USE_LIBUV"] = "0"
    join_process_group(
        backend, timeout=timeout, device=chosen if backend.endswith("nccl") else None
    )
    if num_local > 1 and chosen.type == "cuda" and ":" in (device or ""):
        warn(
            f"--device {device}: {num_local} processes run here, each takes the GPU of its own "
            "local rank; CUDA_VISIBLE_DEVICES chooses which GPUs there are"
        )
    return Ranks(dist.get_rank(), dist.get_world_size(), chosen)


def local_ranks() -> tuple[int, int]:
    """The local rank, and the number of ranks on this machine.

    torchrun sets the number as LOCAL_WORLD_SIZE, deepspeed as LOCAL_SIZE; where neither is set, all
    WORLD_SIZE ranks may be here.
    """
    if "RANK" not in os.environ:
        return 0, 1
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    count = next((os.environ[name] for name in names if name in os.environ), "1")
    return int(os.environ.get("LOCAL_RANK", 0)), int(count)


def resolve_compute(
    device: str | None, dtype: str, *, local_rank: int | None = None, is_shared: bool = False
) -> tuple[torch.device, str]:
    """The device of this process, and the `torch.distributed` backend.

    CUDA tensors go over NCCL where PyTorch has it (not on Windows), all others over gloo.

    Args:
        local_rank: among several processes on this machine; None where this is the only one.
        is_shared: several processes train together.
    Raises:
        ValueError: the device is not there, cannot compute in this dtype, or cannot be shared.
    """
    chosen = choose_device(device, local_rank=local_rank)
    if chosen.type == "mps" and is_shared:
        raise ValueError("several ranks cannot share MPS; start one process, or use --device cpu")
    check_dtype(chosen, dtype)
    is_nccl = chosen.type == "cuda" and dist.is_nccl_available()
    return chosen, "cpu:gloo,cuda:nccl" if is_nccl else "gloo"


def launch_token() -> str | None:
    """An id of the torchrun process that started this rank, the same over its restarts of the
    ranks; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    launcher = os.getppid()
    try:  # process numbers are reused, but not with the same start time
        started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""
    return " ".join(
        (socket.gethostname(), str(launcher), started, os.environ["TORCHELASTIC_RUN_ID"])
    )
