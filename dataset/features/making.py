"""Owns computing the features that a cache lacks: all ranks share the work, size and time are
announced first, and what is done stays however the run ends.

Shapes: I pictures, S image side in pixels, P patches of a picture, V width of the vision tower.
"""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dataset.features.shards import Layout, ShardWriter, content_key
from dataset.features.survey import Index, Source
from dataset.lm_dataset import VLMDataset

Item = TypeVar("Item")
GIB = 2**30
# Ranks meet this often, so that none waits for a slower one beyond the timeout of a collective.
TURN_S = 20.0
WARM_UP, MEASURED = 1, 4  # pictures of each rank from which the time is estimated


class Maker(Protocol):
    """Computes features; `model.vision.features.FeatureMaker`."""

    batch_size: int
    num_patches: int
    width: int

    def describe(self) -> dict[str, Any]: ...

    def preprocess(self, image: bytes) -> Tensor:
        """(1, 3, S, S) of an encoded picture."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """(I, P, V) float32 on the CPU, of (I, 3, S, S)."""


class Group(Protocol):
    """The ranks; `trainer.ranks.group.Ranks`."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, value: Item) -> list[Item]: ...

    def collect(self, work: Callable[[], list[Item]]) -> list[Item]: ...


@dataclass(frozen=True)
class CacheOptions:
    """How a cache may be made.

    Args:
        folder: of the caches of all towers. dtype: "float16", "float32" or "int8".
        max_gib: the folder's largest size; None: what the disk holds.
        num_threads: that decode pictures.
        reserve_bytes: what the disk must still hold beside the cache.
    """

    folder: Path
    dtype: str
    max_gib: float | None = None
    num_threads: int = 1
    reserve_bytes: int = 0


@dataclass
class Missing:
    """Pictures to compute, in the order of the data, and what became of those done.

    unfit: values beyond what the format holds. broken: why pictures could not be read.
    """

    keys: list[bytes]
    sources: dict[bytes, Source]
    num_done: int = 0
    num_unfit: int = 0
    broken: list[str] = field(default_factory=list)


def take_turns(
    group: Group, steps: Iterator[None], report: Callable[[], None] = lambda: None
) -> None:
    """Go through every rank's steps to their end; each rank's `report` is called between turns.

    Raises:
        ValueError, OSError: on every rank, what a step of any rank raised.
    """

    def turn() -> list[bool]:
        ends_s = time.monotonic() + TURN_S
        for _ in steps:
            if time.monotonic() > ends_s:
                return [False]
        return [True]

    while True:
        has_ended: list[bool] = group.collect(turn)
        if all(has_ended):
            return
        report()


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Making:
    """Computes missing pictures into a cache's folder.

    Args:
        home: the folder of this tower's shards.
    """

    def __init__(
        self,
        datasets: Sequence[VLMDataset],
        maker: Maker,
        *,
        home: Path,
        layout: Layout,
        options: CacheOptions,
        group: Group,
        log: Callable[[str], None],
    ):
        self.datasets, self.maker, self.home, self.layout = datasets, maker, home, layout
        self.options, self.group, self.log = options, group, log
        self._index = Index(home, layout)
        self._writer = ShardWriter(home)

    def run(self, missing: Missing, *, num_pictures: int) -> None:
        """Announce and compute; the same `missing.keys` on every rank.

        Raises:
            ValueError: the disk is too small. OSError: it could not be written.
        """
        keys = missing.keys[: self._num_that_fit(missing.keys)]
        if not keys:
            return
        share = keys[self.group.rank :: self.group.world_size]
        start = int.from_bytes(os.urandom(4), "little") % max(len(share), 1)
        share = share[start:] + share[:start]  # another run begins elsewhere
        picture_s = max(self.group.gather(self._measure(share, missing)))
        size, world_size = len(keys) * self.layout.entry_bytes, self.group.world_size
        whole_s = picture_s * -(-len(keys) // world_size)
        self.log(
            f"feature cache {self.home}: {num_pictures - len(missing.keys)} of {num_pictures} "
            f"pictures are there, {len(keys)} to compute: {show_bytes(size)}, about "
            f"{_clock(whole_s)} on {world_size} rank(s); what is done stays if this is stopped"
        )
        started_s, before = time.monotonic(), missing.num_done

        def report() -> None:
            done = sum(self.group.gather(missing.num_done - before))
            left_s = (len(keys) - done) * (time.monotonic() - started_s) / max(done, 1)
            self.log(f"features: {done} of {len(keys)} pictures, {_clock(left_s)} to go")

        rest = share[WARM_UP + MEASURED :]
        take_turns(self.group, self._compute(rest, missing), report)
        self._writer.close()

    def _num_that_fit(self, keys: list[bytes]) -> int:
        """How many pictures the bound leaves room for; ValueError if the disk holds fewer."""
        size = self.layout.entry_bytes

        def look() -> list[tuple[int, int]]:
            free = shutil.disk_usage(self.home).free - self.options.reserve_bytes
            bound = self.options.max_gib
            room = None if bound is None else bound * GIB - folder_bytes(self.options.folder)
            num = len(keys) if room is None else min(len(keys), max(0, int(room // size)))
            return [(num, free)]

        num_fit, free = min(self.group.collect(look))
        if num_fit and num_fit * size > free:
            raise ValueError(
                f"{self.home} has {show_bytes(max(free, 0))} free beside what saving needs, the "
                f"features of {num_fit} pictures need {show_bytes(num_fit * size)}; bound them by "
                "--cache_gb, free some space, or name another folder by --cache_vision_features"
            )
        return num_fit

    def _measure(self, share: list[bytes], missing: Missing) -> float:
        """Compute the first pictures of a rank's share; returns seconds a picture."""
        seconds = []
        for keys in (share[:WARM_UP], share[WARM_UP : WARM_UP + MEASURED]):
            started_s = time.monotonic()
            take_turns(self.group, self._compute(keys, missing))
            seconds.append((time.monotonic() - started_s) / max(len(keys), 1))
        return seconds[-1] if len(share) > WARM_UP else seconds[0]

    def _compute(self, keys: list[bytes], missing: Missing) -> Iterator[None]:
        """Compute pictures, a batch at a time; those that another run has done are left out."""
        for batch in self._decoded(keys, missing):
            if batch:
                features = self.maker.features(torch.cat([pixels for _, pixels in batch]))
                entries = [
                    self.layout.pack(key, one)
                    for (key, _), one in zip(batch, features, strict=True)
                ]
                missing.num_unfit += entries.count(None)
                self._writer.append(b"".join(filter(None, entries)))
            yield

    def _decoded(self, keys: list[bytes], missing: Missing) -> Iterator[list[tuple[bytes, Tensor]]]:
        """Batches of preprocessed pictures; threads decode one batch ahead."""
        waiting: deque[tuple[int, list[tuple[bytes, Future[Tensor]]]]] = deque()
        with ThreadPoolExecutor(max(1, self.options.num_threads)) as pool:
            for start in range(0, len(keys) + self.maker.batch_size, self.maker.batch_size):
                some = keys[start : start + self.maker.batch_size]
                self._index.refresh()
                jobs = [
                    (key, pool.submit(self.maker.preprocess, image))
                    for key, image in self._read(some, missing)
                ]
                waiting.append((len(some), jobs))
                if len(waiting) > 1:
                    num, done = waiting.popleft()
                    yield list(self._results(done, missing))
                    missing.num_done += num

    def _read(self, keys: list[bytes], missing: Missing) -> Iterator[tuple[bytes, bytes]]:
        for key in keys:
            source = missing.sources[key]
            records = self.datasets[source.dataset].records
            if key in self._index.places:
                continue
            try:
                image = records.read_image(records[source.record].images[source.image])
            except (ValueError, OSError) as error:
                missing.broken.append(str(error))
                continue
            if content_key(image) == key:  # else it was changed meanwhile, and is not cached
                yield key, image

    def _results(
        self, jobs: list[tuple[bytes, Future[Tensor]]], missing: Missing
    ) -> Iterator[tuple[bytes, Tensor]]:
        for key, job in jobs:
            try:
                yield key, job.result()
            except (ValueError, OSError) as error:
                source = missing.sources[key]
                where = self.datasets[source.dataset].where(source.record)
                missing.broken.append(f"{where}: {error}")


def show_bytes(size: float) -> str:
    """A size in GiB, or in MiB where it is small."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.2f} MiB"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
