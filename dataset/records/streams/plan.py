"""Owns the order of a stream: windows of units, each shuffled as a whole.

A pass takes every record once. Its shards are shuffled, then the units of each shard; `window`
units in a row are a window, the first ones are smaller (1, 2, 4, ...), so that the first step waits
for one unit; the records of a window are shuffled together. All draws depend on seed, pass, and the
number of shard or window alone: neither ranks nor workers nor what is in the cache plays a part.

A stream is endless: pass after pass. An epoch takes the next `num_samples` of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset.records.streams.remote import at_once
from dataset.records.streams.units import Unit

Ids = npt.NDArray[np.int64]
ROW_BITS = 32  # the id of a record is its shard and, in the lower bits, its row in it
SHARDS, UNITS, ROWS = 0x57A0, 0x57A1, 0x57A2  # keep the draws apart from others of seed and pass
Place = tuple[int, Unit]  # a unit and the number of its shard


@dataclass(frozen=True)
class Window:
    """Units whose records are shuffled together: the draws' key, and records to leave out."""

    places: tuple[Place, ...]
    draws: tuple[int, ...]
    num_skipped: int = 0

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for _, unit in self.places)

    def ids(self) -> Ids:
        """The ids of its records, in their order."""
        rows = [
            (number << ROW_BITS) + np.arange(unit.first_row, unit.first_row + unit.num_rows)
            for number, unit in self.places
        ]
        order = np.random.default_rng(self.draws).permutation(self.num_rows)
        return np.concatenate(rows).astype(np.int64)[order][self.num_skipped :]


@dataclass(frozen=True)
class Plan:
    """The windows of a stream.

    units_of: the units of a shard by its number; may take a while.
    """

    num_shards: int
    units_of: Callable[[int], Sequence[Unit]]
    seed: int
    window: int

    def shard_order(self, turn: int) -> list[int]:
        """The shards of a pass, in their order."""
        order: list[int] = self._dice(SHARDS, turn).permutation(self.num_shards).tolist()
        return order

    def _dice(self, *key: int) -> Any:
        return np.random.default_rng((key[0], self.seed, *key[1:]))

    def windows(self, turn: int) -> Iterator[Window]:
        """The windows of a pass. Shards are asked about no earlier than their window comes."""
        left, places, size, number = self.shard_order(turn), list[Place](), 1, 0
        while left or places:
            while left and len(places) < size:
                wanted = size - len(places)
                asked, left = left[:wanted], left[wanted:]
                for shard, units in zip(asked, at_once(self.units_of, asked), strict=True):
                    order = self._dice(UNITS, turn, shard).permutation(len(units))
                    places += [(shard, units[i]) for i in order if units[i].num_rows]
            if places:
                yield Window(tuple(places[:size]), (ROWS, self.seed, turn, number))
            places, number, size = places[size:], number + 1, min(2 * size, self.window)

    def windows_from(self, position: int) -> Iterator[Window]:
        """The windows of the endless stream from a record on; the first may have been begun."""
        turn = 0
        while True:
            num_rows = 0
            for window in self.windows(turn):
                num_rows += window.num_rows
                if position < window.num_rows:
                    yield Window(window.places, window.draws, position)
                    position = 0
                else:
                    position -= window.num_rows
            if not num_rows:
                return
            # The first pass has said how many records there are: whole ones need no walk.
            turn, position = turn + 1 + position // num_rows, position % num_rows
