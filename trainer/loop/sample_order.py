"""Owns the order of samples: a function of seed and epoch alone, shared out over the ranks."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from trainer.ranks.group import Ranks


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


class Indices(Protocol):
    """Indices in order: a sequence, an array or a sampler with a length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...


class SkipBatchSampler(Sampler[list[int]]):
    """Batches of a sequence of indices, leaving out the first ones without loading them.

    Args:
        sampler: indices in order (a sequence, or any sampler).
        batch_size: indices per batch; the last one may be smaller.
        skip_batches: how many to leave out.
        num_batches: batches in all, the skipped ones included, so that every rank yields as many;
            batches behind the end of the indices are empty.
    """

    def __init__(
        self,
        sampler: Indices,
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
    order: npt.NDArray[np.int64], *, start: int, batch_size: int, ranks: Ranks
) -> SkipBatchSampler:
    """This rank's batches of a global order, from sample `start` on.

    Every global micro-step takes the next `batch_size * world_size` samples of the order, and
    rank r of W every W-th of them from the r-th on. The samples before `start` may have been
    consumed by another number of ranks.
    """
    per_step = batch_size * ranks.world_size
    order = order[start % per_step :]
    return SkipBatchSampler(
        order[ranks.rank :: ranks.world_size],
        batch_size,
        start // per_step,
        num_batches=-(-len(order) // per_step),
    )
