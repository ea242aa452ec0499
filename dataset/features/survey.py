"""Owns finding the pictures of data sets, and which of them a cache has whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset.features.reading import SLOT_BITS, name_key
from dataset.features.shards import Layout, ShardMaps, content_key, discard, keys_of, shard_paths
from dataset.lm_dataset import VLMDataset


@dataclass(frozen=True)
class Source:
    """Where a picture stands: the number of its data set, record, and image of the record."""

    dataset: int
    record: int
    image: int


@dataclass
class Survey:
    """The pictures of some data sets: `names[i]` name key -> content key in data set i, and where
    each picture, by its content key, stands first."""

    names: list[dict[bytes, bytes]]
    sources: dict[bytes, Source] = field(default_factory=dict)

    def add(self, other: "Survey") -> None:
        """Take in what another rank has found."""
        for mine, others in zip(self.names, other.names, strict=True):
            mine |= others
        for key, source in other.sources.items():
            self.sources.setdefault(key, source)


def find_pictures(
    datasets: Sequence[tuple[VLMDataset, int]], survey: Survey, *, rank: int, world_size: int
) -> Iterator[None]:
    """Hash the pictures of a rank's share of the records, a record at a time.

    Neighbouring records often have the same picture, so a share is of neighbours. Bad records and
    files that cannot be read are left out.

    Args:
        datasets: each with the number of its first records that count.
    """
    for number, (dataset, num_records) in enumerate(datasets):
        names = survey.names[number]
        share = num_records * rank // world_size, num_records * (rank + 1) // world_size
        for index in range(*share):
            try:
                for place, image in enumerate(dataset.records[index].images):
                    name = name_key(image) if isinstance(image, str) else None
                    if name in names:
                        continue
                    key = content_key(dataset.records.read_image(image))
                    survey.sources.setdefault(key, Source(number, index, place))
                    if name is not None:
                        names[name] = key
            except (ValueError, OSError):
                pass  # it is a bad sample, with this message, whenever it is read
            yield


class Index:
    """The entries of a cache's folder, by key; of several entries of a picture the oldest shard's
    first."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self.paths: list[Path] = []
        self.places: dict[bytes, tuple[int, int]] = {}  # shard, slot
        self._seen: dict[Path, int] = {}  # slots of a shard that were looked at
        self.refresh()

    def refresh(self) -> None:
        """Look at what was added since the last look, by this process or by others."""
        for path in shard_paths(self.folder):
            if path not in self._seen:
                self._seen[path] = 0
                self.paths.append(path)
            since, count = self._seen[path], path.stat().st_size // self.layout.entry_bytes
            shard = self.paths.index(path)
            for key, slot in keys_of(path, self.layout, start=since, stop=count):
                self.places.setdefault(key, (shard, slot))
            self._seen[path] = count

    def items(self) -> Iterator[tuple[bytes, int]]:
        """Key and place of every picture, as `CachedFeatures` looks them up."""
        for key, (shard, slot) in self.places.items():
            yield key, shard << SLOT_BITS | slot


def discard_damaged(index: Index, keys: Sequence[bytes], found: list[bytes]) -> Iterator[None]:
    """Check entries, one at a time, and discard the damaged ones, also in their files.

    Args:
        found: the keys of damaged entries are added to it.
    """
    maps = ShardMaps(index.paths, index.layout)
    for key in keys:
        shard, slot = index.places[key]
        if not index.layout.is_whole(maps.entry(shard, slot), key):
            discard(index.paths[shard], index.layout, slot)
            found.append(key)
        yield
