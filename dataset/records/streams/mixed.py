"""Owns the order of a mixture in which a source is a stream: which source each sample is of.

An epoch is cut into blocks of `BLOCK` samples. Each block takes of every source its share of what
the epoch still takes of it, rounded so that the epoch's numbers come out exactly; which of the
block's samples these are is drawn from seed, epoch and block. Each source goes on in its own order:
a stream in the stream's, a local one in one permutation of its records after the other.
"""

import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from dataset.records.base import Records
from dataset.records.streams.plan import Ids

BLOCK = 4096
BLOCKS, PASSES = 0x57A3, 0x57A4  # keep the draws apart from others of seed and epoch


def quotas(num_taken: Sequence[int]) -> Iterator[list[int]]:
    """How many samples each block takes of each source."""
    left = np.array(num_taken, dtype=np.int64)
    while total := int(left.sum()):
        exact = left * (min(BLOCK, total) / total)
        quota = np.minimum(np.floor(exact).astype(np.int64), left)
        rest = min(BLOCK, total) - int(quota.sum())
        order = np.argsort(quota - exact, kind="stable")  # the largest remainders first
        for source in itertools.islice((i for i in order if quota[i] < left[i]), rest):
            quota[source] += 1
        left -= quota
        yield quota.tolist()


def local_ids(num_records: int, position: int, *, seed: int, source: int) -> Generator[Ids]:
    """The numbers of a local source from a position of its endless stream on."""
    turn, skipped = divmod(position, num_records)
    while True:
        dice = np.random.default_rng((PASSES, seed, source, turn))
        yield dice.permutation(num_records)[skipped:]
        turn, skipped = turn + 1, 0


class MixedIds:
    """The ids of an epoch's samples from `start` on, block by block.

    Args:
        starts: of each source's ids. num_taken: of each source in an epoch.
    """

    def __init__(
        self,
        sources: Sequence[Records],
        starts: Sequence[int],
        num_taken: Sequence[int],
        seed: int,
        *,
        epoch: int,
        start: int,
    ):
        self._seed, self._epoch, self._starts = seed, epoch, starts
        blocks = list(quotas(num_taken))
        self._first, self._skipped = divmod(start, BLOCK)
        self._blocks = blocks[self._first :]
        self._ids: list[Any] = []
        for number, (records, taken) in enumerate(zip(sources, num_taken, strict=True)):
            before = sum(block[number] for block in blocks[: self._first])
            at, left = epoch * taken + before, taken - before
            stream = getattr(records, "ids_from", None)
            local = local_ids(len(records), at, seed=seed, source=number) if not stream else None
            self._ids.append(stream(at, left) if stream else local)

    @property
    def is_waiting(self) -> bool:
        """Whether another machine has yet to send something."""
        return any(getattr(ids, "is_waiting", False) for ids in self._ids)

    def __iter__(self) -> Generator[Ids]:
        pieces = [iter(ids) for ids in self._ids]
        left = [np.empty(0, np.int64)] * len(pieces)
        try:
            for number, quota in enumerate(self._blocks, self._first):
                together = []
                for source, count in enumerate(quota):
                    while len(left[source]) < count:
                        left[source] = np.concatenate([left[source], next(pieces[source])])
                    own, left[source] = left[source][:count], left[source][count:]
                    together.append(own + self._starts[source])
                dice = np.random.default_rng((BLOCKS, self._seed, self._epoch, number))
                yield dice.permutation(np.concatenate(together))[self._skipped :]
                self._skipped = 0
        finally:
            for piece in pieces:
                piece.close()
