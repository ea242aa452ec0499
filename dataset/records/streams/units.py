"""Owns what a shard is made of: the units that are fetched one by one.

A unit of a Parquet shard is a run of row groups of about `UNIT_BYTES`, so that a file of any size
streams; its footer says all about them and is a few requests away. A shard of another kind is one
unit, and how many records it has is known once it was fetched. What is known of a shard is kept in
the cache folder, under its address, size and tag.

A fetched unit of Parquet is a file as long as the shard in which only the unit's row groups and the
footer are written; the rest are holes, which take no room. So the readers of local files read it.
"""

import contextlib
import gzip
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from dataset.records.base import Records
from dataset.records.data_file import is_empty
from dataset.records.streams.cache import FACTS, ShardCache
from dataset.records.streams.remote import Remote, Shard, Shards, StreamError, Wanted, always

UNIT_BYTES = 1 << 26
VERSION = 1  # of how shards are cut into units
PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
SUFFIXES = (*PARQUET_SUFFIXES, ".tar", ".jsonl", ".ndjson", ".json", ".arrow", ".jsonl.gz",
            ".ndjson.gz", ".json.gz")  # fmt: skip
CHUNK_BYTES = 1 << 24  # of a request
FOOTER_BYTES = 1 << 16  # read for a footer at first
UNPACKED = 6  # times the size of a .gz, for which room is made
MAGIC = b"PAR1"
Span = tuple[int, int]  # bytes of a shard, from and to


@dataclass(frozen=True)
class Unit:
    """Records of a shard that are fetched together: which rows, and the bytes they lie in."""

    first_row: int
    num_rows: int
    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        return sum(end - start for start, end in self.spans)


class UnitStore:
    """The units of shards: what is known of them, and their files.

    Args:
        open_file: the reader of a local file.
    """

    def __init__(self, remote: Remote, cache: ShardCache, open_file: Callable[[Path], Records]):
        self.remote, self.cache, self.open_file = remote, cache, open_file

    def units(self, shard: Shard) -> list[Unit]:
        """The units of a shard, in order.

        Raises:
            StreamError: it cannot be had, or is not what its name says.
        """
        place = self.cache.folder / FACTS / f"{key_of(shard)}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads(place.read_bytes())
            return [Unit(u["first_row"], u["num_rows"], tuple(map(tuple, u["spans"])))
                    for u in facts["units"]]  # fmt: skip
        units = self._parquet_units(shard) if is_parquet(shard.name) else [self._whole(shard)]
        text = json.dumps({"url": shard.url, "units": [asdict(unit) for unit in units]})
        write_whole(place, text.encode())
        return units

    def _whole(self, shard: Shard) -> Unit:
        """The unit of a shard that is fetched as a whole; its records are counted."""
        if not shard.size:
            return Unit(0, 0, ())
        path = self.fetch(shard, Unit(0, 0, ((0, shard.size),)))
        try:
            return Unit(0, len(self.open_file(path)), ((0, shard.size),))
        except (ValueError, OSError) as error:
            if is_empty(error):
                return Unit(0, 0, ())
            raise StreamError(f"{shard.url}: {error}") from error

    def _parquet_units(self, shard: Shard) -> list[Unit]:
        footer = self._footer(shard)
        try:
            file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(MAGIC + footer))
            return list(runs_of_groups(file.metadata, (shard.size - len(footer), shard.size)))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            first_line = str(error).partition("\n")[0]
            raise StreamError(f"{shard.url}: not a readable Parquet file ({first_line})") from error

    def _footer(self, shard: Shard) -> bytes:
        """A Parquet file's footer, with the length and the magic behind it."""
        if not shard.size:
            raise StreamError(f"{shard.url}: not a readable Parquet file (it is empty)")
        start = max(0, shard.size - FOOTER_BYTES)
        tail = self.remote.read(shard, start, shard.size)
        length = 8 + int.from_bytes(tail[-8:-4], "little")
        if tail[-4:] != MAGIC or length > shard.size:
            raise StreamError(f"{shard.url}: not a readable Parquet file (no footer)")
        if length > len(tail):
            tail = self.remote.read(shard, shard.size - length, shard.size)
        return tail[-length:]

    def path(self, shard: Shard, unit: Unit) -> Path | None:
        """The file of a unit, if it was fetched; it is then noted as in use."""
        key = key_of(shard, unit)
        self.cache.use(key)
        return self.cache.find(key, local_name(shard))

    def fetch(self, shard: Shard, unit: Unit, *, is_wanted: Wanted = always) -> Path:
        """The file of a unit; fetched unless it is here.

        Raises:
            StreamError: it cannot be had, was changed, does not fit, or is no longer wanted.
        """
        is_packed = shard.name.lower().endswith(".gz")
        num_bytes = unit.num_bytes * (UNPACKED if is_packed else 1)
        if num_bytes > self.cache.max_bytes:
            raise StreamError(
                f"{shard.url}: {num_bytes / 2**30:.3g} GiB are fetched at once and "
                f"--stream_cache_gb allows {self.cache.max_bytes / 2**30:.3g}; give more, or cut "
                "it into smaller shards"
            )

        def write(path: Path) -> None:
            if is_packed:
                packed = path.with_name("packed")
                self._download(shard, unit, packed, is_wanted)
                self._unpack(shard, packed, path)
                packed.unlink()
            else:
                self._download(shard, unit, path, is_wanted)

        key, name = key_of(shard, unit), local_name(shard)
        return self.cache.keep(key, name, num_bytes=num_bytes, fetch=write)

    def _download(self, shard: Shard, unit: Unit, path: Path, is_wanted: Wanted) -> None:
        with open(path, "wb") as file:
            for start, end in unit.spans:
                for first in range(start, end, CHUNK_BYTES):
                    last = min(first + CHUNK_BYTES, end)
                    if not is_wanted():
                        raise StreamError(f"{shard.url}: no longer wanted")
                    data = self.remote.read(shard, first, last, is_wanted=is_wanted)
                    if len(data) != last - first:  # its server knows no ranges: it sent all
                        file.seek(0)
                        file.write(data)
                        break
                    file.seek(first)
                    file.write(data)
        self.remote.check_unchanged(shard)

    def _unpack(self, shard: Shard, packed: Path, path: Path) -> None:
        try:
            with gzip.open(packed) as source, open(path, "wb") as file:
                while data := source.read(CHUNK_BYTES):
                    file.write(data)
                    if file.tell() > self.cache.max_bytes:
                        raise StreamError(f"{shard.url}: unpacked it is over --stream_cache_gb")
        except (gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
            if isinstance(error, StreamError):
                raise
            raise StreamError(f"{shard.url}: not a readable gzip file ({error})") from error


def runs_of_groups(metadata: pyarrow.parquet.FileMetaData, footer: Span) -> Iterator[Unit]:
    """The units of a Parquet file: neighbouring row groups up to `UNIT_BYTES`, one at least."""
    first_row = num_rows = 0
    spans: list[Span] = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        span = span_of(group)
        size = sum(end - start for start, end in spans)
        if spans and size + span[1] - span[0] > UNIT_BYTES:
            yield Unit(first_row, num_rows, (*spans, footer))
            first_row, num_rows, spans = first_row + num_rows, 0, []
        num_rows += group.num_rows
        if spans and spans[-1][1] == span[0]:
            spans[-1] = spans[-1][0], span[1]
        else:
            spans.append(span)
    if num_rows:
        yield Unit(first_row, num_rows, (*spans, footer))


def span_of(group: pyarrow.parquet.RowGroupMetaData) -> Span:
    """The bytes that the columns of a row group lie in."""
    starts, ends = [], []
    for number in range(group.num_columns):
        column = group.column(number)
        offsets = [column.data_page_offset, column.dictionary_page_offset or None]
        start = min(offset for offset in offsets if offset is not None)
        starts.append(start)
        ends.append(start + column.total_compressed_size)
    return min(starts), max(ends)


def is_parquet(name: str) -> bool:
    """Whether a shard is read by its footer."""
    return name.lower().endswith(PARQUET_SUFFIXES)


def check_kinds(shards: Shards) -> None:
    """Raise StreamError for a shard whose name says no kind that is read."""
    for url, name in zip(shards.urls, shards.names, strict=True):
        if not name.lower().endswith(SUFFIXES):
            raise StreamError(f"{url}: no shard that can be read; they end in "
                              f"{', '.join(SUFFIXES)}")  # fmt: skip


def local_name(shard: Shard) -> str:
    """What a unit's file is called here: as the shard, in messages too."""
    name = shard.name
    return name[:-3] if name.lower().endswith(".gz") else name


def key_of(shard: Shard, unit: Unit | None = None) -> str:
    """Names what is kept of a shard, or of a unit."""
    what = f"{VERSION} {UNIT_BYTES}" if unit is None else f"{unit.spans}"
    text = f"{shard.url} {shard.size} {shard.tag} {what}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_whole(place: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=place.parent, prefix=".part-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
