"""Owns what a rank brings to a step, and what all ranks agree on before they take it.

Every rank comes to every agreement, with data or without: one that waits for data which never
comes leads all of them out, at the same step.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from trainer.loop.loading import DataFault
from trainer.ranks.group import Ranks
from trainer.ranks.signals import StopSignal, StopWaiting


@dataclass
class Share:
    """This rank's micro-batches of a step, or fewer and why."""

    batches: list = field(default_factory=list)
    is_whole: bool = True  # False where a signal or a fault ended the wait
    fault: DataFault | None = None
    wait_s: float = 0.0


@dataclass(frozen=True)
class Agreement:
    """What all ranks know alike before a step."""

    sums: list[float]
    is_stopping: bool
    has_data: bool  # every rank has: the step can be taken


def shares_of(batches: Iterable, size: int) -> Iterator[Share]:
    """Group batches by `size` micro-batches a step. Those that the end leaves incomplete are a
    step of their own; there are as many steps on every rank."""
    left = len(batches)
    with contextlib.closing(iter(batches)) as source:
        for start in range(0, left, size):
            share = Share()
            started_s = time.perf_counter()
            try:
                while len(share.batches) < min(size, left - start):
                    share.batches.append(next(source))
            except StopWaiting:
                share.is_whole = False
            except DataFault as fault:
                share.is_whole, share.fault = False, fault
            share.wait_s = time.perf_counter() - started_s
            yield share


def agree(share: Share, ranks: Ranks, stop: StopSignal, values: list[float]) -> Agreement:
    """Sum values over the ranks, and whether to stop.

    Raises:
        DataFault: on every rank, if any of them has one.
    """
    votes = stop.votes()
    own = [float(not share.is_whole), float(share.fault is not None)]
    num_short, num_faults, *rest = ranks.host_sum([*own, *votes, *values])
    if num_faults:
        words = ranks.gather(None if share.fault is None else str(share.fault))
        rank, reason = next((r, word) for r, word in enumerate(words) if word)
        raise share.fault or DataFault(f"rank {rank}: {reason}")
    is_stopping = stop.adopt(rest[: len(votes)]) or bool(num_short)
    return Agreement(rest[len(votes) :], is_stopping, has_data=not num_short)
