"""Owns what a rank brings to a step, and what all ranks agree on before they take it.

Every rank takes part in every agreement, with data or without. So a rank whose data never comes
makes all ranks leave at the same step.
"""

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from trainer.loop.loading import DataFault
from trainer.ranks.group import Ranks
from trainer.ranks.signals import StopSignal, StopWaiting


class BadSample(Protocol):
    """A sample that cannot be used."""

    @property
    def reason(self) -> str: ...


class MicroBatch(Protocol):
    """What the loop asks of a batch: the model's inputs, and counts known without the device."""

    num_samples: int
    num_sequences: int
    num_supervised: int
    num_tokens: int
    num_truncated: int
    sample_names: list[str]
    target_sources: Tensor | None
    target_weights: Tensor | None

    @property
    def bad_samples(self) -> Sequence[BadSample]: ...

    def inputs_on(self, device: torch.device) -> dict[str, Tensor]: ...


class Batches(Protocol):
    """This rank's batches, each as one micro-batch or several; as many on every rank. Closing the
    generator ends its data workers."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Generator[list[MicroBatch]]: ...


@dataclass
class Share:
    """This rank's micro-batches of a step, or fewer and why."""

    batches: list[MicroBatch] = field(default_factory=list)
    is_whole: bool = True  # False where a signal or a fault ended the wait
    fault: DataFault | None = None
    wait_s: float = 0.0


@dataclass(frozen=True)
class Agreement:
    """What every rank knows before a step, the same on all."""

    sums: list[float]
    is_stopping: bool
    has_data: bool  # every rank has: the step can be taken


def shares_of(batches: Batches, size: int) -> Generator[Share]:
    """Group batches into steps of `size`. A remainder at the end is a step of its own; there are as
    many steps on every rank."""
    left = len(batches)
    with contextlib.closing(iter(batches)) as source:
        for start in range(0, left, size):
            share = Share()
            started_s = time.perf_counter()
            try:
                for _ in range(min(size, left - start)):
                    share.batches += next(source)
            except StopWaiting:
                share.is_whole = False
            except DataFault as fault:
                share.is_whole, share.fault = False, fault
            share.wait_s = time.perf_counter() - started_s
            yield share


def agree(share: Share, ranks: Ranks, stop: StopSignal, values: Sequence[float]) -> Agreement:
    """Sum `values` over the ranks, and settle whether all of them stop.

    Raises:
        DataFault: on every rank, if any of them has one.
    """
    votes = stop.votes()
    own = [float(not share.is_whole), float(share.fault is not None)]
    num_short, num_faults, *rest = ranks.host_sum([*own, *votes, *values])
    if num_faults:
        reasons = ranks.gather(None if share.fault is None else str(share.fault))
        rank, reason = next((r, reason) for r, reason in enumerate(reasons) if reason)
        raise share.fault or DataFault(f"rank {rank}: {reason}")
    is_stopping = stop.adopt(rest[: len(votes)]) or bool(num_short)
    return Agreement(rest[len(votes) :], is_stopping, has_data=not num_short)
