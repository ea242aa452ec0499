"""Owns the order of samples: a function of seed and epoch alone, shared out over the ranks."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from trainer.ranks.group import Ranks

MIXTURE = 0x3150  # keeps the draws for a source apart from others of seed and epoch


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


class Part(Protocol):
    """A source in a mixture."""

    @property
    def num_records(self) -> int: ...

    @property
    def num_taken(self) -> int: ...


def samples_per_epoch(dataset: Any) -> int:
    """How many samples an epoch takes: all, or what the weights of a mixture say."""
    parts = getattr(dataset, "parts", None)
    return len(dataset) if parts is None else sum(part.num_taken for part in parts)


def dataset_order(dataset: Any, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of a data set's samples in an epoch; a function of seed and epoch alone."""
    parts = getattr(dataset, "parts", None)
    if parts is None:
        return epoch_order(len(dataset), seed=seed, epoch=epoch)
    return mixed_order(parts, seed=seed, epoch=epoch)


def mixed_order(parts: Sequence[Part], *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The samples that an epoch takes of each source, shuffled together.

    A source is an endless stream, one permutation of its records after the other. Epoch e takes
    its samples from e times as many on, so none is taken twice before all were taken.
    """
    taken, start = [], 0
    for number, part in enumerate(parts):
        first = epoch * part.num_taken
        last = first + part.num_taken - 1
        passes = range(first // part.num_records, last // part.num_records + 1)
        dice = [np.random.default_rng((MIXTURE, seed, number, turn)) for turn in passes]
        stream = np.concatenate([one.permutation(part.num_records) for one in dice])
        skipped = first - passes.start * part.num_records
        taken.append(stream[skipped : skipped + part.num_taken] + start)
        start += part.num_records
    together = np.concatenate(taken)
    return together[epoch_order(len(together), seed=seed, epoch=epoch)]


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
