"""Owns `StreamRecords`: records of shards on other machines, fetched as they are needed.

Why no streaming library: a run must go on at exactly the next sample after `kill -9`, also with
another number of ranks and workers. Tried (BENCHMARKS.md, "Streams"): datasets forgets its shuffle
buffer, so that records are lost and others repeated (huggingface/datasets#7901); torchdata's state
is of as many workers; webdataset has none (webdataset#234). Not tried: mosaicml-streaming and
energon, which do not read Parquet and JSONL as they are published.
Here the order is a function of (seed, pass), as for local files, so that a position is one number:
the samples taken so far.
"""

import hashlib
import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dataset.records.address import Address, StreamOptions
from dataset.records.base import Records
from dataset.records.conversation import Record
from dataset.records.data_file import NO_RECORDS
from dataset.records.images import open_images
from dataset.records.streams.ahead import Ahead
from dataset.records.streams.cache import ShardCache
from dataset.records.streams.plan import ROW_BITS, Ids, Place, Plan, Window
from dataset.records.streams.remote import Remote, Shard, StreamError, Wanted, always, at_once
from dataset.records.streams.units import Unit, UnitStore, check_kinds, is_parquet

COUNTED = 512  # shards whose footers are read before the first step; of more, a sample
COMPARED = 64  # shards whose size and tag stand for all, where these are not all asked about
IN_FLIGHT = 3  # windows that are here at once: being finished, being taken, being fetched


class StreamRecords(Records):
    """Records by id: `shard << 32 | row`. `len` is what an epoch takes, counted or estimated.

    Raises:
        StreamError: shards cannot be found, read or kept.
    """

    is_stream = True

    def __init__(
        self,
        address: Address,
        images_path: Path | None,
        options: StreamOptions,
        open_file: Callable[[Path], Records],
    ):
        super().__init__(Path(address.path), open_images(images_path))
        self.address, self._options = address, options
        remote = Remote(address)
        self.shards = remote.shards()
        self._were_all_asked = self.shards.is_known
        check_kinds(self.shards)
        cache = ShardCache(options.folder, max_bytes=int(options.cache_gb * 2**30))
        self._store = UnitStore(remote, cache, open_file)
        self._readers: OrderedDict[tuple[int, int], tuple[Path, Records]] = OrderedDict()
        self._units: dict[int, list[Unit]] = {}
        self.num_samples, self.is_counted = self._count()
        if not self.num_samples:
            raise StreamError(f"{address}: {NO_RECORDS}")

    @property
    def summary(self) -> str:
        """What is read, for the header of a run."""
        about = "" if self.is_counted else "about "
        return (
            f"stream {self.address}: {len(self.shards)} shard(s), {about}{self.num_samples} "
            f"samples an epoch, kept in {self._store.cache.folder}"
        )

    @property
    def plan(self) -> Plan:
        """The order of the records."""
        return Plan(len(self.shards), self.units_of, self._options.seed, self._options.window)

    def units_of(self, shard: int) -> list[Unit]:
        """The units of a shard, by its number."""
        if shard not in self._units:
            units = self._units[shard] = self._store.units(self.shards[shard])
            if not sum(unit.num_rows for unit in units):
                sys.stderr.write(f"warning: {self.shards[shard].url}: {NO_RECORDS}; passed over\n")
        return self._units[shard]

    def _count(self) -> tuple[int, bool]:
        """How many samples an epoch takes, and whether that is all records, counted.

        What is asked for depends on seed and shards alone, not on what the cache knows: the number
        must stay the same when a run goes on.
        """
        is_cheap = all(map(is_parquet, self.shards.names))
        limit = COUNTED if is_cheap else self._options.window
        order = self.plan.shard_order(0)
        is_counted = len(order) <= limit
        step = len(order) if is_counted else COUNTED // 4 if is_cheap else 1
        num_rows, numbers = 0, order[:0]
        while not num_rows and len(numbers) < len(order):  # the first ones may hold no record
            numbers = order[: len(numbers) + step]
            asked = self.shards.ask(numbers)
            found = at_once(self.units_of, numbers)
            num_rows = sum(unit.num_rows for units in found for unit in units)
        if is_counted or not num_rows:
            return num_rows, True
        num_bytes = sum(shard.size for shard in asked)
        if self.shards.is_known:
            total = sum(shard.size for shard in self.shards.ask(range(len(self.shards))))
        else:
            some = self.shards.ask(self._some)
            total = sum(shard.size for shard in some) * len(self.shards) / len(some)
        return round(num_rows / num_bytes * total), False

    def __len__(self) -> int:
        return self.num_samples

    @property
    def num_ids(self) -> int:
        return len(self.shards) << ROW_BITS

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": OrderedDict()}

    def ids(self, epoch: int, start: int) -> Ahead:
        """The ids of an epoch's records from sample `start` on, window by window; a window comes
        once its shards are here, and the next one's are fetched meanwhile."""
        return self.ids_from(epoch * self.num_samples + start, self.num_samples - start)

    def ids_from(self, position: int, num_taken: int) -> Ahead:
        """The ids of records from a position of the endless stream on."""
        return Ahead(self._windows(position, num_taken), self._fetch)

    def _windows(self, position: int, num_left: int) -> Iterator[tuple[Window, int]]:
        """The windows from a position on, with how many of their records are taken."""
        for window in self.plan.windows_from(position):
            if num_left <= 0:
                return
            yield window, num_left
            num_left -= window.num_rows - window.num_skipped

    def _fetch(self, window: Window, is_wanted: Wanted = always) -> None:
        """Bring the shards of a window here."""
        needed = IN_FLIGHT * sum(unit.num_bytes for _, unit in window.places)
        allowed = self._store.cache.max_bytes // self._options.num_streams
        if needed > allowed:
            raise StreamError(
                f"{self.address}: {IN_FLIGHT} windows of {len(window.places)} shards (or parts of "
                f"them) take {needed / 2**30:.3g} GiB, and --stream_cache_gb allows "
                f"{allowed / 2**30:.3g}: give more, or a smaller --stream_window"
            )

        def fetch(place: Place) -> Path:
            return self._store.fetch(self.shards[place[0]], place[1], is_wanted=is_wanted)

        at_once(fetch, window.places)

    def first_ids(self, most: int) -> list[int]:
        """Ids of records that are needed first: those of the first unit, at most so many."""
        window = next(self.plan.windows(0))
        self._fetch(window)
        ids: Ids = window.ids()[:most]
        return sorted(ids.tolist())

    def _place(self, index: int) -> tuple[Records, int]:
        number, row = index >> ROW_BITS, index & ((1 << ROW_BITS) - 1)
        if not 0 <= number < len(self.shards):
            raise IndexError(index)
        units = self.units_of(number)
        unit = units[bisect_right(units, row, key=lambda unit: unit.first_row) - 1]
        place = number, unit.first_row
        if place not in self._readers:
            self._readers[place] = self._open(self.shards[number], unit)
        self._readers.move_to_end(place)
        return self._readers[place][1], row

    def _open(self, shard: Shard, unit: Unit) -> tuple[Path, Records]:
        """The file of a unit, which is fetched unless it is here, and its reader."""
        for place in [place for place, (path, _) in self._readers.items() if not path.exists()]:
            del self._readers[place]  # else its file would go on taking room
        if len(self._readers) >= IN_FLIGHT * self._options.window:
            self._readers.popitem(last=False)
        path = self._store.path(shard, unit) or self._store.fetch(shard, unit)
        try:
            return path, self._store.open_file(path)
        except (ValueError, OSError) as error:
            if path.exists():
                raise StreamError(f"{shard.url}: {error}") from error
        return self._open(shard, unit)  # it had just made room for another

    def where(self, index: int) -> str:
        """ "shard:record", without a look into the shard."""
        number, row = index >> ROW_BITS, index & ((1 << ROW_BITS) - 1)
        return f"{Address(self.shards.urls[number]).name}:record {row}"

    def __getitem__(self, index: int) -> Record:
        reader, row = self._place(index)
        return reader[row]

    def _raw(self, index: int, *, where: str) -> Mapping[str, Any]:
        reader, row = self._place(index)
        return reader._raw(row, where=where)

    @property
    def _some(self) -> list[int]:
        """Numbers of shards that stand for all, where there are too many to ask about each."""
        num_shards = len(self.shards)
        return [place * (num_shards - 1) // (COMPARED - 1) for place in range(COMPARED)]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the shards by name, size and tag; of very many, size and tag of some.

        States of earlier versions do not fit very many: an epoch then took another number of
        samples, counted by all sizes, so that positions in it mean others now.
        """
        digest, compared = hashlib.sha256(), list(range(len(self.shards)))
        if not self._were_all_asked:
            digest.update("\n".join(self.shards.names).encode())
            compared = self._some
        for shard in self.shards.ask(compared):
            digest.update(f"{shard.name} {shard.size} {shard.tag}\n".encode())
        return digest.hexdigest()

    @property
    def former_fingerprint(self) -> str:
        return self.fingerprint
