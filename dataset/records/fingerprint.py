"""Owns the fingerprint of a data file: a hash by which a resumed run recognises its data."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WHOLE_BYTES = 1 << 28  # a file up to this size is hashed whole; some 0.2 s
BLOCK_BYTES = 1 << 20
LEAST_BLOCKS = 4  # hashed of each of several files


def files_fingerprint(paths: Sequence[Path], num_records: int) -> str:
    """That of a file; of several, SHA-256 of theirs, for which they share `WHOLE_BYTES`."""
    if len(paths) == 1:
        return file_fingerprint(paths[0], num_records)
    share = max(LEAST_BLOCKS * BLOCK_BYTES, WHOLE_BYTES // len(paths))
    digest = hashlib.sha256(f"{len(paths)} {num_records}".encode())
    for path in paths:
        digest.update(file_fingerprint(path, 0, whole_bytes=share).encode())
    return digest.hexdigest()


def file_fingerprint(path: Path, num_records: int, *, whole_bytes: int = WHOLE_BYTES) -> str:
    """SHA-256 of a file's size, number of records and bytes.

    Of a larger file than `whole_bytes`, that many bytes are hashed: its first and last block, and
    one block at a pseudorandom place in each of equally long parts of the file.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} {num_records} ".encode())
    with open(path, "rb") as file:
        if size <= whole_bytes:
            while chunk := file.read(BLOCK_BYTES):
                digest.update(chunk)
            return digest.hexdigest()
        num_blocks = whole_bytes // BLOCK_BYTES
        last, dice = size - BLOCK_BYTES, np.random.default_rng(size)
        spots = (np.arange(num_blocks - 2) + dice.random(num_blocks - 2)) / (num_blocks - 2)
        for start in (0, *(spots * last).astype(np.int64), last):
            file.seek(int(start))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def ends_fingerprint(path: Path, num_records: int) -> str:
    """The fingerprint in states of earlier versions: SHA-256 of size, number of records, first and
    last block. It does not notice an edit in the middle of the file."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} {num_records} ".encode())
    with open(path, "rb") as file:
        digest.update(file.read(BLOCK_BYTES))
        file.seek(max(0, size - BLOCK_BYTES))
        digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
