"""Owns the group of ranks: this process among all, its device, what ranks tell one another."""

import itertools
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from model.machine.device import check_dtype, choose_device, memory_guard, prepare_device
from trainer.ranks.meeting import join_process_group

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
    """This process among all, and its device."""

    rank: int
    world_size: int
    device: torch.device

    def host_sum(self, values: list[float]) -> list[float]:
        """Sum numbers over all ranks on the host, without touching the device."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value) -> list:
        """A small object of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def batches(self, items: Iterable, size: int) -> Iterator[list]:
        """This rank's batches of items; they are the same ones for any number of ranks."""
        source = iter(items)
        for number in itertools.count():
            batch = list(itertools.islice(source, size))
            if not batch:
                return
            if number % self.world_size == self.rank:
                yield batch

    def collect(self, work: Callable[[], list]) -> list:
        """The results of every rank's work, in the order of the ranks, on all of them.

        Raises:
            ValueError, OSError: what any of them raised.
        """
        try:
            with memory_guard("lower --batch_size"):
                share = work()
        except (ValueError, OSError) as error:
            share = error
        shares = self.gather(share)
        for found in shares:
            if isinstance(found, Exception):
                raise found
        return [item for found in shares for item in found]

    def from_first(self, value):
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
    deepspeed, if there is one.

    Where a machine has several of its processes, each takes the GPU of its local rank; a device
    with an index counts where there is one process.

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
    if not is_distributed:
        return Ranks(0, 1, chosen)
    if os.name == "nt":  # PyTorch for Windows is built without libuv
        os.environ["USE_LIBUV"] = "0"
    join_process_group(
        backend, timeout=timeout, device=chosen if backend.endswith("nccl") else None
    )
    if num_local > 1 and chosen.type == "cuda" and ":" in (device or ""):
        warn(f"--device {device}: {num_local} processes run here, each takes the GPU of its own "
             "local rank; CUDA_VISIBLE_DEVICES chooses which GPUs there are")  # fmt: skip
    return Ranks(dist.get_rank(), dist.get_world_size(), chosen)


def local_ranks() -> tuple[int, int]:
    """Which of this machine's processes of the run this is, and how many there are.

    torchrun says the number as LOCAL_WORLD_SIZE, deepspeed as LOCAL_SIZE; where neither is said,
    all of WORLD_SIZE may be here.
    """
    if "RANK" not in os.environ:
        return 0, 1
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    count = next((os.environ[name] for name in names if name in os.environ), "1")
    return int(os.environ.get("LOCAL_RANK", 0)), int(count)


def resolve_compute(
    device: str | None, dtype: str, *, local_rank: int | None = None, is_shared: bool = False
) -> tuple[torch.device, str]:
    """The device of this process, and the backend that carries tensors between such processes.

    CUDA tensors travel over nccl where PyTorch has it (not on Windows), all others over gloo.

    Args:
        local_rank: which of several processes on this machine this is; None where it is alone.
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
    """Tells this machine's launcher from every other, over its restarts of the ranks; None
    without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    launcher = os.getppid()
    try:  # a number is given again to other processes, but not at the same tick
        started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""
    return " ".join(
        (socket.gethostname(), str(launcher), started, os.environ["TORCHELASTIC_RUN_ID"])
    )
