"""Owns how ranks share the order of a stream, which is known only a window at a time."""

from collections.abc import Generator, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from trainer.loop.loading import DataFault
from trainer.ranks.group import Ranks

Ids = npt.NDArray[np.int64]


class Ahead(Protocol):
    """Ids of samples, piece by piece, each once its samples are on this machine."""

    @property
    def is_waiting(self) -> bool: ...

    def __iter__(self) -> Generator[Ids]: ...


class Stream(Protocol):
    """Samples of an epoch from one on. `len` is how many an epoch has."""

    def __len__(self) -> int: ...

    def ids(self, epoch: int, start: int) -> Ahead: ...


class StreamBatches(Sampler[list[int]]):
    """This rank's batches of an epoch from global sample `start` on, as `rank_batches` shares them:
    of the next `batch_size * world_size` samples, rank r of W takes every W-th from the r-th on.

    It can be iterated once.
    """

    def __init__(self, stream: Stream, *, epoch: int, start: int, batch_size: int, ranks: Ranks):
        self._per_step, self._ranks = batch_size * ranks.world_size, ranks
        self._num_batches = max(0, -(-(len(stream) - start) // self._per_step))
        self._ahead = stream.ids(epoch, start)
        self._source: Generator[Ids] | None = None
        self._left = np.empty(0, np.int64)

    @property
    def is_waiting(self) -> bool:
        """Whether another machine has yet to send what the next batch needs."""
        return self._ahead.is_waiting

    def __len__(self) -> int:
        return self._num_batches

    def prepare(self) -> None:
        """Wait for the first samples, before data workers are started.

        Raises:
            DataFault: they cannot be had.
        """
        while len(self._left) < self._per_step and self._take():
            pass

    def close(self) -> None:
        """End what is being fetched."""
        if self._source is not None:
            self._source.close()

    def _take(self) -> bool:
        """Add the next piece to what is left; False at the end."""
        if self._source is None:
            self._source = iter(self._ahead)
        try:
            piece = next(self._source, None)
        except ValueError as error:  # a `StreamError`: one line
            raise DataFault(str(error)) from error
        if piece is None:
            return False
        self._left = np.concatenate([self._left, piece])
        return True

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._num_batches):
            self.prepare()
            batch, self._left = self._left[: self._per_step], self._left[self._per_step :]
            yield batch[self._ranks.rank :: self._ranks.world_size].tolist()
