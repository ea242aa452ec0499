"""Owns reading features in place of pictures, in every process that makes samples."""

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from torch import Tensor

from dataset.features.shards import KEY_BYTES, ShardMaps, content_key
from dataset.features.table import Table

SLOT_BITS = 32  # a place is shard << SLOT_BITS | slot


def name_key(name: str) -> bytes:
    """The key of a picture's name among those of one data set."""
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class CachedFeatures:
    """The features of one data set's pictures; `dataset.lm_dataset.Features`.

    Args:
        places: content key -> place of its entry.
        names: name key -> content key, so that a picture with a name is not even opened.
        warn: told of an entry that was damaged after it had been checked.
    """

    def __init__(
        self, maps: ShardMaps, *, places: Table, names: Table, warn: Callable[[str], None]
    ):
        self._maps, self._places, self._names, self._warn = maps, places, names, warn
        self._warned: set[bytes] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_warned": set()}

    def get(self, image: str | bytes) -> Tensor | None:
        """(P, V) of a picture, float16 or float32; None where the cache has no whole entry."""
        key = content_key(image) if isinstance(image, bytes) else self._names.find(name_key(image))
        place = None if key is None else self._places.find(key)
        if key is None or place is None:
            return None
        key = bytes(key).ljust(KEY_BYTES, b"\0")
        shard, slot = divmod(int(place), 1 << SLOT_BITS)
        try:
            entry = self._maps.entry(shard, slot)
        except (OSError, ValueError) as error:
            self._report(key, str(error))
            return None
        if not self._maps.layout.is_whole(entry, key):
            self._report(key, f"entry {slot} of {self._maps.paths[shard]} is damaged")
            return None
        return self._maps.layout.unpack(entry)

    def _report(self, key: bytes, reason: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            self._warn(f"{reason}: its picture is computed anew; the next start mends the cache")
