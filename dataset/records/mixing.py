"""Owns mixtures: several sources of records that are trained on together, each with a weight.

A source of N records and weight w gives round(w N) samples an epoch. Each is taken once before any
is taken again, over epochs too: an epoch goes on in the source where the one before has ended.
"""

import hashlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from dataset.records.address import Address, is_address
from dataset.records.base import Records
from dataset.records.conversation import Record

WEIGHT = re.compile(r"(.+):(\d+\.?\d*|\.\d+)")

MOST_WEIGHT = 1_000  # an epoch's samples lie in memory as numbers


@dataclass(frozen=True)
class Source:
    """Records to train on, and how much of them an epoch takes."""

    path: Path | Address
    weight: float | None = None  # None: it was not given, which is 1

    def __str__(self) -> str:
        return str(self.path) + ("" if self.weight is None else f":{self.weight:g}")


@dataclass(frozen=True)
class Mixture:
    """The sources of `--data_path`, in its order."""

    sources: tuple[Source, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.sources))

    @property
    def num_streams(self) -> int:
        """How many sources are on another machine."""
        return sum(isinstance(source.path, Address) for source in self.sources)

    @property
    def name(self) -> str:
        """For messages, where a single file has its name."""
        return " + ".join(source.path.name for source in self.sources)


@dataclass(frozen=True)
class Part:
    """A source in a mixture: how many records it has, and how many samples an epoch takes."""

    name: str
    num_records: int
    num_taken: int


def parse_sources(texts: Sequence[str]) -> Path | Address | Mixture:
    """What `--data_path` names: one path or address, or a mixture of `PATH` and `PATH:WEIGHT`.

    Raises:
        ValueError: a weight of 0 or above `MOST_WEIGHT`, or a path that is given twice.
    """
    sources = [_parse_source(text) for text in texts]
    if len(sources) == 1 and sources[0].weight is None:
        return sources[0].path
    for source, times in Counter(source.path for source in sources).items():
        if times > 1:
            raise ValueError(f"--data_path names {source} twice; give it a weight, as {source}:2")
    return Mixture(tuple(sources))


def _parse_source(text: str) -> Source:
    match = WEIGHT.fullmatch(text)
    if match is None or Path(text).expanduser().exists():
        return Source(_parse_path(text))
    weight = float(match[2])
    if not weight:
        raise ValueError(f"--data_path {text}: a weight must be above 0; or leave the source out")
    if weight > MOST_WEIGHT:
        raise ValueError(
            f"--data_path {text}: a weight may be {MOST_WEIGHT:,} at most: so often an epoch takes "
            "each record; train for more --epochs"
        )
    return Source(_parse_path(match[1]), weight)


def _parse_path(text: str) -> Path | Address:
    return Address(text) if is_address(text) else Path(text).expanduser()


class MixedRecords(Records):
    """The records of all sources, one source behind the other.

    Args:
        open_source: opens the records of a path or address.
        seed: of the order, where a source is a stream.
    Raises:
        ValueError, OSError: a source cannot be read.
    """

    def __init__(
        self, mixture: Mixture, open_source: Callable[[Path | Address], Records], *, seed: int = 0
    ):
        self.seed = seed
        self._sources = [open_source(source.path) for source in mixture.sources]
        self._starts = [0, *accumulate(records.num_ids for records in self._sources)]
        self.is_stream = any(records.is_stream for records in self._sources)
        super().__init__(as_path(mixture.sources[0].path), None)
        self.num_blank = sum(records.num_blank for records in self._sources)
        self.slowness = next((r.slowness for r in self._sources if r.slowness), None)
        self.empty_files = tuple(path for r in self._sources for path in r.empty_files)
        names = source_names([as_path(source.path) for source in mixture.sources])
        self.parts = [
            Part(name, len(records), max(1, round((source.weight or 1) * len(records))))
            for name, source, records in zip(names, mixture.sources, self._sources, strict=True)
        ]

    def __len__(self) -> int:
        if self.is_stream:  # whose order is its own
            return sum(part.num_taken for part in self.parts)
        return self._starts[-1]

    @property
    def num_ids(self) -> int:
        return self._starts[-1]

    @property
    def summary(self) -> str:
        """What is read of streams, for the header of a run."""
        streams = [records for records in self._sources if records.is_stream]
        return "\n".join(records.summary for records in streams)  # type: ignore[attr-defined]

    def ids(self, epoch: int, start: int) -> Any:
        """Where a source is a stream: the ids of an epoch's records from sample `start` on."""
        from dataset.records.streams.mixed import MixedIds  # with fsspec, which is slow to import

        taken = [part.num_taken for part in self.parts]
        return MixedIds(self._sources, self._starts, taken, self.seed, epoch=epoch, start=start)

    def first_ids(self, most: int) -> list[int]:
        """Where a source is a stream: ids of records that are looked at before the first step."""
        most = max(1, most // len(self._sources))
        found = []
        for start, records in zip(self._starts, self._sources, strict=False):
            step = -(-len(records) // most)
            own = getattr(records, "first_ids", lambda _, r=records, s=step: range(0, len(r), s))
            found += [start + number for number in own(most)]
        return found

    def source_of(self, index: int) -> int:
        """Number of the source that a record is of."""
        if not 0 <= index < self.num_ids:
            raise IndexError(index)
        return bisect_right(self._starts, index) - 1

    def _place(self, index: int) -> tuple[Records, int]:
        source = self.source_of(index)
        return self._sources[source], index - self._starts[source]

    def where(self, index: int) -> str:
        records, place = self._place(index)
        return records.where(place)

    def __getitem__(self, index: int) -> Record:
        records, place = self._place(index)
        return records[place]

    def _raw(self, index: int, *, where: str) -> Mapping[str, Any]:
        records, place = self._place(index)
        return records._raw(place, where=where)

    def read_image(self, image: str | bytes) -> bytes:
        """As `Records.read_image`; all sources look names up in one place."""
        named = next((r for r in self._sources if r.images is not None), self._sources[0])
        return named.read_image(image)

    def files(self) -> list[Path]:
        """The files that hold the records, in order."""
        return [path for records in self._sources for path in records.files()]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies records and weights, not the paths."""
        digest = hashlib.sha256()
        for records, part in zip(self._sources, self.parts, strict=True):
            digest.update(f"{records.fingerprint} {part.num_taken} ".encode())
        return digest.hexdigest()

    @property
    def former_fingerprint(self) -> str:
        return self.fingerprint


def as_path(path: Path | Address) -> Path:
    """A path for names in messages."""
    return Path(path.path) if isinstance(path, Address) else path


def source_names(paths: Sequence[Path]) -> list[str]:
    """Short names of sources: the file's, or the folder's of a pattern; longer where two are
    alike."""
    names = [path.parent.name if set(path.name) & set("*?[") else path.stem for path in paths]
    names = [name or "data" for name in names]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in paths]
    if len(set(names)) < len(names):
        names = [f"{number} {name}" for number, name in enumerate(names, 1)]
    return names
