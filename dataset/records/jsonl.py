"""Owns records of a JSONL file: random access by an index of line offsets."""

import os
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from dataset.records.base import Records
from dataset.records.conversation import BadRecordError, decode, parse_json
from dataset.records.data_file import NO_RECORDS, check_text
from dataset.records.images import open_images
from dataset.records.index_file import Index, is_mapped, kept_index

SCAN_CHUNK_BYTES = 1 << 20
SHORT_LINE_BYTES = 8  # longer lines are not checked for white space
LONGEST_BYTES = 1 << 26  # of a record; a hole in a sparse file may be a line of terabytes
WIDTH = 3  # of an index: where a record begins, its length in bytes, its line


class JsonlRecords(Records):
    """Records of a JSONL file, found by an index of line offsets.

    Blank lines hold no record; `num_blank` counts them and `where` keeps the real line numbers.
    """

    def __init__(self, data_path: Path, images_path: Path | None, *, fix_image_count: bool = False):
        check_text(data_path)
        super().__init__(data_path, open_images(images_path), fix_image_count=fix_image_count)
        self._fd: BufferedReader | None = None
        self._fd_owner: int | None = None  # process id: each process opens the file for itself
        self._index = self._find_index()
        if not len(self):
            raise ValueError(f"{data_path}: {NO_RECORDS}")
        self.num_blank = self._count_blank()

    def _find_index(self) -> Index:
        return kept_index(self.data_path, self._make_index, kind=type(self).__name__, width=WIDTH)

    def _make_index(self) -> Index:
        return index_lines(self.data_path)

    def _count_blank(self) -> int:
        """Lines without a record; those behind the last one are looked at."""
        start, length, number = map(int, self._index[-1])
        with open(self.data_path, "rb") as file:
            file.seek(start + length)
            return number - len(self) + sum(1 for _ in file)

    def _read(self, start: int, length: int) -> bytes:
        if self._fd is None or self._fd_owner != os.getpid():
            self._fd, self._fd_owner = open(self.data_path, "rb"), os.getpid()
        self._fd.seek(int(start))
        return self._fd.read(int(length))

    def __getstate__(self) -> dict[str, Any]:
        index = None if is_mapped(self._index) else self._index
        return self.__dict__ | {"_fd": None, "_fd_owner": None, "_index": index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if state["_index"] is None:  # it is mapped again, not sent
            self._index = self._find_index()

    def __len__(self) -> int:
        return len(self._index)

    def where(self, index: int) -> str:
        """ "file:line" of a record."""
        return f"{self.data_path.name}:{self._index[index, 2]}"

    def _raw(self, index: int, *, where: str) -> Mapping[str, Any]:
        start, length, _ = self._index[index]
        if length > LONGEST_BYTES:
            raise BadRecordError(
                f"{where}: of {length / 2**20:,.0f} MiB, and a record may have "
                f"{LONGEST_BYTES >> 20}; mend or delete it"
            )
        raw = parse_json(decode(self._read(start, length), where=where), where=where)
        if not isinstance(raw, dict):
            raise BadRecordError(f"{where}: a record must be a JSON object")
        return raw


def index_lines(path: Path) -> Index:
    """Where the lines that are not blank lie: (N, 3), with line numbers from 1."""
    ends, base = [], 0
    buffer = np.empty(SCAN_CHUNK_BYTES, dtype=np.uint8)
    is_break = np.empty(SCAN_CHUNK_BYTES, dtype=bool)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer.data):
            np.equal(buffer[:size], ord("\n"), out=is_break[:size])
            # Breaks are rare: where they are is found in an eighth of the time among packed bits.
            packed = np.packbits(is_break[:size])
            eights = np.flatnonzero(packed != 0)
            found = np.flatnonzero(np.unpackbits(packed[eights]).view(bool))
            ends.append(8 * eights[found // 8] + found % 8 + (base + 1))
            base += size
    bounds = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
    if bounds[-1] != base:
        bounds = np.append(bounds, base)
    lengths = np.diff(bounds)
    filled = lengths > 0
    with open(path, "rb") as file:
        for line in np.flatnonzero(lengths <= SHORT_LINE_BYTES):
            file.seek(int(bounds[line]))
            filled[line] = bool(file.read(int(lengths[line])).strip())
    numbers = np.flatnonzero(filled) + 1
    return np.stack([bounds[:-1][filled], lengths[filled], numbers], axis=1)
