"""Owns indexes that are kept: where the records of a file lie, found by one pass for good.

An index is an array of int64 with a row a record, kept beside its file as `.NAME.index`, or in the
user's cache folder where that folder cannot be written. It begins with what the file was like, and
is made anew where that has changed. It is mapped into memory, so all processes of a machine share
it. The index of a small file is not kept: it is made faster than it is read.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]

KEPT_FROM_BYTES = 1 << 22  # smaller files are indexed in some 10 ms
VERSION = 2
MAGIC = b"mmv-records-index"
KEY_BYTES = 32
HEAD_BYTES = 64  # magic, key and number of rows, padded, so that the array is aligned
ENDS_BYTES = 1 << 16  # hashed at either end of the file


def kept_index(path: Path, build: Callable[[], Index], *, kind: str, width: int) -> Index:
    """The index of a file: the kept one if the file is still the same, else a new one.

    Args:
        build: makes it, (N, width), by a pass over the file.
        kind: of the index; another kind of the same file is another index.
    """
    if path.stat().st_size < KEPT_FROM_BYTES:
        return build()
    key = _key(path, kind)
    places = index_places(path)
    for place in places:
        found = _read(place, key, width=width)
        if found is not None:
            return found
    index = build()
    if _key(path, kind) != key:  # it was written to meanwhile
        return index
    for place in places:
        found = _read(place, key, width=width)  # another process may have been as fast
        if found is not None:
            return found
        with contextlib.suppress(OSError):
            _write(place, key, index)
            kept = _read(place, key, width=width)
            return index if kept is None else kept
    return index


def is_mapped(index: Index) -> bool:
    """Whether an index is mapped, so that another process maps it rather than being sent it."""
    base: object = index
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


def index_places(path: Path) -> list[Path]:
    """Where the index of a file may be kept: beside it, and in the user's cache folder."""
    place = Path(os.path.abspath(path))
    beside = place.with_name(f".{place.name}.index")
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # this user has no home
        return [beside]
    named = f"{place.name}.{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.index"
    return [beside, cache / "minimind-v" / named]


def _key(path: Path, kind: str) -> bytes:
    """What a file is like: size, time of the last change, both ends."""
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        digest = hashlib.sha256(f"{VERSION} {kind} {about.st_size} {about.st_mtime_ns}".encode())
        digest.update(file.read(ENDS_BYTES))
        file.seek(max(0, about.st_size - ENDS_BYTES))
        digest.update(file.read(ENDS_BYTES))
    return digest.digest()


def _read(place: Path, key: bytes, *, width: int) -> Index | None:
    """A kept index, mapped; None where there is none, or one of something else."""
    try:
        with open(place, "rb") as file:
            head = file.read(HEAD_BYTES)
            num_bytes = os.fstat(file.fileno()).st_size - HEAD_BYTES
        num_rows = num_bytes // (8 * width)
        if not num_rows or num_rows * 8 * width != num_bytes or head != _head(key, num_rows):
            return None
        shape = (num_rows, width)
        # A plain array is a good deal faster to take an element of.
        return np.asarray(np.memmap(place, np.int64, "r", offset=HEAD_BYTES, shape=shape))
    except (OSError, ValueError):
        return None


def _head(key: bytes, num_rows: int) -> bytes:
    """How an index begins; with its length, so that one that was cut off is not taken."""
    return (MAGIC + key + num_rows.to_bytes(8, "little")).ljust(HEAD_BYTES, b"\0")


def _write(place: Path, key: bytes, index: Index) -> None:
    """Write an index whole or not at all; several processes may do so at once."""
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=place.parent, prefix=f"{place.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_head(key, len(index)))
            file.write(np.ascontiguousarray(index).data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
