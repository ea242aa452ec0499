"""Owns records of several files that are read as one, in the order of their names."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from dataset.records.base import Records
from dataset.records.conversation import Record
from dataset.records.data_file import NO_RECORDS, is_empty
from dataset.records.open_files import OpenedAtNeed


class ShardedRecords(Records):
    """The records of several files, each opened when it is needed; those without are passed over.

    Args:
        data_path: what the user named: a file, a folder or a pattern.
        open_shard: opens one file; must be picklable.
    Raises:
        ValueError, OSError: a file cannot be read, or none holds a record.
    """

    def __init__(self, data_path: Path, paths: Sequence[Path], open_shard: Callable[..., Records]):
        self._paths: list[Path] = []
        self._shards: list[OpenedAtNeed[Records]] = []
        counts, slow, self.num_blank = [], [], 0
        for path in paths:
            opened = OpenedAtNeed(partial(open_shard, path))
            try:
                shard = opened.get()
            except ValueError as error:
                if not is_empty(error):
                    raise
                self.empty_files += (path,)
                continue
            self._paths.append(path)
            self._shards.append(opened)
            counts.append(len(shard))
            self.num_blank += shard.num_blank
            slow += [shard.slowness] if shard.slowness else []
        if not counts:
            raise ValueError(f"{data_path}: {NO_RECORDS}")
        self._starts = [0, *accumulate(counts)]  # of each file's records; the last is their number
        super().__init__(data_path, self._shard(0).images)
        self.slowness = slow[0] if slow else None

    def _shard(self, number: int) -> Records:
        shard = self._shards[number].get()
        if len(shard) != self._starts[number + 1] - self._starts[number]:
            raise ValueError(f"{self._paths[number]} was changed while it is in use")
        return shard

    def _place(self, index: int) -> tuple[Records, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        return self._shard(number), index - self._starts[number]

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
