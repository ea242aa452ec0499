"""Owns records of several files that are read as one, in the order of their names."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from dataset.records.base import Records
from dataset.records.conversation import Record

MAX_OPEN = 256  # files, in each process


class ShardedRecords(Records):
    """The records of several files. Few files are open at once.

    Args:
        data_path: what the user named: a folder or a pattern.
        open_shard: opens one file; must be picklable.
    Raises:
        ValueError, OSError: a file cannot be read.
    """

    def __init__(self, data_path: Path, paths: Sequence[Path], open_shard: Callable[..., Records]):
        self._paths, self._open_shard = list(paths), open_shard
        self._opened: OrderedDict[int, Records] = OrderedDict()
        self._starts: list[int] = []  # of each file's records; the last is their number
        counts, slow, self.num_blank = [], [], 0
        for number in range(len(self._paths)):
            shard = self._shard(number)
            counts.append(len(shard))
            self.num_blank += shard.num_blank
            slow += [shard.slowness] if shard.slowness else []
        self._starts = [0, *accumulate(counts)]
        super().__init__(data_path, self._shard(0).images)
        self.slowness = slow[0] if slow else None

    def _shard(self, number: int) -> Records:
        if number not in self._opened:
            shard = self._open_shard(self._paths[number])
            if self._starts and len(shard) != self._starts[number + 1] - self._starts[number]:
                raise ValueError(f"{self._paths[number]} was changed while it is in use")
            self._opened[number] = shard
            if len(self._opened) > MAX_OPEN:
                self._opened.popitem(last=False)
        self._opened.move_to_end(number)
        return self._opened[number]

    def _place(self, index: int) -> tuple[Records, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        return self._shard(number), index - self._starts[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict()}

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, index: int) -> str:
        shard, place = self._place(index)
        return shard.where(place)

    def __getitem__(self, index: int) -> Record:
        shard, place = self._place(index)
        return shard[place]

    def _raw(self, index: int, *, where: str) -> Mapping[str, Any]:
        shard, place = self._place(index)
        return shard._raw(place, where=where)

    def files(self) -> list[Path]:
        """The files that hold the records, in order."""
        return self._paths
