"""Owns how a data file is told from another one by its content."""

import hashlib
from pathlib import Path

import numpy as np

WHOLE_BYTES = 1 << 28  # a file up to this size counts whole in its fingerprint; some 0.2 s
BLOCK_BYTES = 1 << 20


def file_fingerprint(path: Path, num_records: int) -> str:
    """SHA-256 of a file's size, number of records and bytes.

    Of a file beyond `WHOLE_BYTES` as many bytes count, in blocks that are spread over all of it:
    one at a place of its own in each of as many equal stretches, its beginning and end included.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} {num_records} ".encode())
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            while chunk := file.read(BLOCK_BYTES):
                digest.update(chunk)
            return digest.hexdigest()
        num_blocks = WHOLE_BYTES // BLOCK_BYTES
        last, dice = size - BLOCK_BYTES, np.random.default_rng(size)
        spots = (np.arange(num_blocks - 2) + dice.random(num_blocks - 2)) / (num_blocks - 2)
        for start in (0, *(spots * last).astype(np.int64), last):
            file.seek(int(start))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def ends_fingerprint(path: Path, num_records: int) -> str:
    """As states of earlier versions have it: SHA-256 of size, number of records, beginning and end
    of a file, so that what was edited in its middle went unnoticed."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} {num_records} ".encode())
    with open(path, "rb") as file:
        digest.update(file.read(BLOCK_BYTES))
        file.seek(max(0, size - BLOCK_BYTES))
        digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
