"""Owns what runs share beside the loop: ranks and devices, AMP, order, states, signals, output."""

import contextlib
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Sampler

from model.inference import choose_device
from model.weights import VISION_PREFIX, atomic_write

STATE_FORMAT = 1
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a save or a slow first batch must fit


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

    def device_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks on the device, in place and without waiting."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


def init_distributed_mode(device: str | None = None) -> Ranks:
    """Join the process group of torchrun or deepspeed, if there is one, and choose the device.

    CPU tensors travel over gloo, CUDA tensors over nccl.

    Raises:
        ValueError: the device is not there.
    """
    chosen = choose_device(device)
    if "RANK" not in os.environ:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        return Ranks(0, 1, chosen)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size(), chosen)


def setup_seed(seed: int) -> None:
    """Seed every generator that training uses."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA and MPS too


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Mixed precision for the forward pass; float32 means none."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


class SkipBatchSampler(Sampler[list[int]]):
    """Batches of a sequence of indices, leaving out the first ones without loading them.

    Args:
        sampler: indices in order (a sequence, or any sampler).
        batch_size: indices per batch; the last one may be smaller.
        skip_batches: how many to leave out.
        num_batches: batches in all, the skipped ones included, where a rank must yield as many
            as the others; those behind the end are empty.
    """

    def __init__(
        self,
        sampler: Sequence[int] | Sampler,
        batch_size: int,
        skip_batches: int = 0,
        *,
        num_batches: int | None = None,
    ):
        self.sampler = sampler
        self.batch_size = batch_size
        self.skip_batches = skip_batches
        self.num_batches = -(-len(sampler) // batch_size) if num_batches is None else num_batches

    def __iter__(self) -> Iterator[list[int]]:
        indices = self.sampler if hasattr(self.sampler, "__getitem__") else list(self.sampler)
        for batch in range(self.skip_batches, self.num_batches):
            start = batch * self.batch_size
            yield [int(i) for i in indices[start : start + self.batch_size]]

    def __len__(self) -> int:
        return max(0, self.num_batches - self.skip_batches)


def rank_batches(
    order: np.ndarray, *, start: int, batch_size: int, ranks: Ranks
) -> SkipBatchSampler:
    """This rank's batches of a global order, from sample `start` on.

    Every global micro-step takes the next `batch_size * world_size` samples of the order, and
    rank r of W every W-th of them from the r-th on. What was consumed before may have been taken
    by another number of ranks.
    """
    per_step = batch_size * ranks.world_size
    order = order[start % per_step :]
    return SkipBatchSampler(
        order[ranks.rank :: ranks.world_size],
        batch_size,
        start // per_step,
        num_batches=-(-len(order) // per_step),
    )


class StopSignal:
    """Turns SIGINT and SIGTERM into a wish that the loop reads between steps.

    A second SIGINT ends the program at once.
    """

    def __init__(self):
        self.signum: int | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
            raise KeyboardInterrupt
        self.signum = signum
        if is_main_process():  # os.write, since print may be interrupted in the middle of itself
            os.write(2, b"\nwill save and leave after this step; Ctrl-C again leaves at once\n")


def ignore_signals(_worker_id: int) -> None:
    """Data workers leave Ctrl-C to the main process, which ends them when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def rng_state(device: torch.device) -> dict:
    """The generators that training draws from, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of a model's tensors but the vision tower's, in full precision."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith(VISION_PREFIX)}


def vlm_checkpoint(path: Path, state: dict | None = None, *, identity: dict) -> dict | None:
    """Save a training state, or load one with `state=None`.

    Args:
        identity: what must not change between saving and resuming, by name.
    Returns:
        The loaded state, or None where there is none.
    Raises:
        ValueError: unreadable, the original project's, or of another identity (which is named).
    """
    if state is not None:
        full = {"format": STATE_FORMAT, "identity": identity} | state
        atomic_write(path, lambda file: torch.save(full, file))
        return None
    if not path.is_file():
        return None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises almost anything on damaged data
        raise ValueError(
            f"{path} is not a readable training state ({type(error).__name__}); "
            "delete it to start afresh"
        ) from error
    if not isinstance(loaded, dict) or loaded.get("format") != STATE_FORMAT:
        raise ValueError(
            f"{path} was not written by this version (the original project's states cannot be "
            "resumed); delete it and start from its weight by --from_weight"
        )
    for name, expected in identity.items():
        found = loaded["identity"].get(name)
        if found != expected:
            raise ValueError(
                f"{path} cannot be resumed: its {name} is {found!r}, this run's is {expected!r}; "
                "use the same, or drop --from_resume to start afresh"
            )
    return loaded
