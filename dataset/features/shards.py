"""Owns the files of a feature cache: how an entry lies in a shard, and which entries there are.

A shard is a file of entries of one size, to which one process appends; nobody else writes into it,
but for the mark by which a damaged entry is discarded. So any number of runs can add to a cache and
read it at once, without a lock, and what a killed process has written counts up to its last whole
entry. An entry is

    magic (4 bytes) | checksum (4) | key of the picture (16) | features

and its checksum also covers the description of the tower, so that the entry of another tower, which
may be as long, counts as damaged.

Shapes: P patches of a picture (prefix included), V width of the vision tower.
"""

import mmap
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

FLOATS = {"float16": torch.float16, "float32": torch.float32}
DTYPES = (*FLOATS, "int8")
MAGIC = b"MVF1"
DISCARDED = b"\0\0\0\0"
KEY_BYTES = 16
HEAD_BYTES = len(MAGIC) + 4 + KEY_BYTES
SUFFIX = ".features"
SCALE_BYTES = 4  # float32
INT8_MAX = 127


def content_key(image: bytes) -> bytes:
    """The key of a picture: the first 16 bytes of the SHA-256 of its file's bytes."""
    return sha256(image).digest()[:KEY_BYTES]


@dataclass(frozen=True)
class Layout:
    """How the features of one tower lie in an entry.

    Args:
        dtype: "float16", "float32", or "int8" with a float32 scale for each patch.
        seal: identifies the tower, its preprocessing and layer; a part of every checksum.
    """

    num_patches: int
    width: int
    dtype: str
    seal: bytes

    @property
    def entry_bytes(self) -> int:
        """Length of an entry."""
        values = self.num_patches * self.width
        if self.dtype in FLOATS:
            return HEAD_BYTES + FLOATS[self.dtype].itemsize * values
        return HEAD_BYTES + SCALE_BYTES * self.num_patches + values

    def pack(self, key: bytes, features: Tensor) -> bytes | None:
        """The entry of a picture; None where its features are not finite in this format.

        Args:
            features: (P, V) float32 on the CPU.
        """
        if self.dtype in FLOATS:
            values = features.to(FLOATS[self.dtype])
            is_finite = bool(values.isfinite().all())
            body = values.numpy().tobytes()
        else:
            scales = features.abs().amax(1, keepdim=True) / INT8_MAX  # (P, 1)
            is_finite = bool(scales.isfinite().all())
            values = (features / scales.clamp(min=torch.finfo(torch.float32).tiny)).round()
            body = scales.numpy().tobytes() + values.nan_to_num().to(torch.int8).numpy().tobytes()
        checksum = self.checksum(key, body).to_bytes(4, "little")
        return MAGIC + checksum + key + body if is_finite else None

    def checksum(self, key: bytes, body: bytes | memoryview) -> int:
        """CRC-32 of seal, key and features."""
        return zlib.crc32(body, zlib.crc32(self.seal + key))

    def is_whole(self, entry: memoryview, key: bytes) -> bool:
        """Whether this is the undamaged entry of a picture, made by this tower."""
        checksum = int.from_bytes(entry[4:8], "little")
        has_head = entry[:4] == MAGIC and entry[8:HEAD_BYTES] == key
        return has_head and self.checksum(key, entry[HEAD_BYTES:]) == checksum

    def unpack(self, entry: memoryview) -> Tensor:
        """The features of an entry, copied: (P, V) in the format's floats; float32 from int8."""
        shape = (self.num_patches, self.width)
        if self.dtype in FLOATS:
            values = np.frombuffer(entry, self.dtype, offset=HEAD_BYTES).reshape(shape)
            return torch.from_numpy(values.copy())
        start = HEAD_BYTES + SCALE_BYTES * self.num_patches
        scales = np.frombuffer(entry[:start], np.float32, offset=HEAD_BYTES)
        whole = np.frombuffer(entry, np.int8, offset=start).reshape(shape)
        return torch.from_numpy(whole.astype(np.float32) * scales[:, None])


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, the oldest first."""
    return sorted(folder.glob("*" + SUFFIX))


def keys_of(path: Path, layout: Layout, *, start: int, stop: int) -> Iterator[tuple[bytes, int]]:
    """Key and slot of each entry from slot `start` to before `stop`, by the heads alone; discarded
    ones are left out."""
    if stop <= start:
        return
    entries = np.memmap(path, np.uint8, "r", shape=(stop, layout.entry_bytes))
    heads = np.ascontiguousarray(entries[start:, :HEAD_BYTES])
    del entries
    for slot, head in enumerate(heads, start=start):
        data = head.tobytes()
        if data[: len(MAGIC)] == MAGIC:
            yield data[HEAD_BYTES - KEY_BYTES :], slot


def discard(path: Path, layout: Layout, slot: int) -> None:
    """Mark an entry as none, in place."""
    with open(path, "r+b") as file:
        file.seek(slot * layout.entry_bytes)
        file.write(DISCARDED)


class ShardMaps:
    """The shards of a cache, mapped into memory when first read; each process maps its own."""

    def __init__(self, paths: list[Path], layout: Layout):
        self.paths, self.layout = paths, layout
        self._maps: dict[int, memoryview] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "layout": self.layout, "_maps": {}}

    def entry(self, shard: int, slot: int) -> memoryview:
        """The bytes of an entry, not checked.

        Raises:
            OSError, ValueError: the shard is not there any more, or shorter.
        """
        size = self.layout.entry_bytes
        if shard not in self._maps or len(self._maps[shard]) < (slot + 1) * size:
            with open(self.paths[shard], "rb") as file:
                self._maps[shard] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        entry = self._maps[shard][slot * size : (slot + 1) * size]
        if len(entry) < size:
            raise ValueError(f"{self.paths[shard]} has become shorter")
        return entry


class ShardWriter:
    """Appends to this process's own shard, which is made with the first entry. Its name begins
    with the time, so that of two entries of a picture the earlier shard's is always the one read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: IO[bytes] | None = None

    def append(self, entries: bytes) -> None:
        """Write whole entries at the end; they stay when this process is killed afterwards.

        Raises:
            OSError: they could not be written; nothing of them is left.
        """
        if self._file is None:
            name = f"{time.time_ns():020d}-{os.getpid()}-{uuid.uuid4().hex[:8]}{SUFFIX}"
            self._file = open(self._folder / name, "xb", buffering=0)  # noqa: SIM115, see close
        end = self._file.tell()
        try:
            num_written = self._file.write(entries)
            if num_written != len(entries):
                raise OSError(f"only {num_written} of {len(entries)} bytes were written")
        except OSError as error:
            self._file.truncate(end)
            raise OSError(
                f"features could not be written into {self._folder} ({error}); what was there "
                "stays; free some space or bound the cache by --cache_gb"
            ) from error

    def close(self) -> None:
        """Close the shard."""
        if self._file is not None:
            self._file.close()
