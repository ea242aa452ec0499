"""Owns finding the elements of arrays in a JSON file without reading it into memory.

A file of gigabytes takes 24 bytes an element here, and one broken element costs no other.
"""

from __future__ import annotations

import mmap
import re
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.records.conversation import BadRecordError, decode, parse_json

# A string (to the file's end where it is not closed), or what begins, ends or parts values.
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)
BLOCK_BYTES = 1 << 24
WHITE = b" \t\r\n"
Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class JsonArray:
    """Elements of an array by their places in a file; raises `BadRecordError` for a broken one.

    starts, ends: in bytes, (N,). lines: counted from 1, (N,). cut_at: the line at which the file
    ends within the array.
    """

    path: Path
    starts: Array
    ends: Array
    lines: Array
    cut_at: int | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, index: int) -> str:
        """ "file:line" of an element, and which it is where a line holds several."""
        line = self.lines[index]
        is_alone = np.count_nonzero(self.lines[max(0, index - 1) : index + 2] == line) == 1
        return f"{self.path}:{line}" + ("" if is_alone else f", element {index + 1}")

    def __getitem__(self, index: int) -> Any:
        """The value of an element."""
        with open(self.path, "rb") as file:
            file.seek(int(self.starts[index]))
            content = file.read(int(self.ends[index] - self.starts[index]))
        where = self.where(index)
        return parse_json(decode(content, where=where), where=where)


def index_arrays(path: Path) -> dict[str | None, JsonArray]:
    """The arrays of a file by name, the whole file being an array or an object of arrays.

    Returns:
        {None: the array}, or the object's arrays by their fields; {} where it is neither.
    """
    if not path.stat().st_size:
        return {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found, cut = _scan(content)
        breaks = _line_breaks(content)
    arrays = {}
    for name, spans in found.items():
        places = np.array(spans, dtype=np.int64).reshape(-1, 2)
        lines = np.searchsorted(breaks, places[:, 0]) + 1
        cut_at = len(breaks) + 1 if name in cut else None
        arrays[name] = JsonArray(path, places[:, 0], places[:, 1], lines, cut_at)
    return arrays


def _scan(content: mmap.mmap) -> tuple[dict[str | None, array[int]], set[str | None]]:
    """Places of elements by array, and the arrays in which the file ends."""
    found: dict[str | None, array[int]] = {}
    depth, inner = 0, -1  # inner: the depth within the array that is being read
    name: str | None = None
    key: bytes | None = None
    start = 0
    for token in TOKEN.finditer(content):
        mark = token[0]
        if mark[0] == 34:  # a quote
            if depth == 1 and inner < 0:
                key = mark
            continue
        if mark in b"[{":
            depth += 1
            if mark == b"[" and inner < 0 and depth == (1 if key is None else 2):
                name = None if key is None else key.strip(b'"').decode("utf-8", "replace")
                inner, start = depth, token.end()
                found[name] = array("q")
            continue
        if depth == inner and mark in b",]}":
            span = _stripped(content, start, token.start())
            if span[0] < span[1]:
                found[name].extend(span)
            start = token.end()
        if mark in b"]}":
            if depth == inner:
                inner = -1
            depth -= 1
            if depth <= 0:
                break
    return found, {name} if inner >= 0 else set()


def _stripped(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A place without the white space around it."""
    while start < end and content[start] in WHITE:
        start += 1
    while start < end and content[end - 1] in WHITE:
        end -= 1
    return start, end


def _line_breaks(content: mmap.mmap) -> Array:
    """Places of line breaks, (L,)."""
    found = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(content), BLOCK_BYTES):
        block = np.frombuffer(content[start : start + BLOCK_BYTES], dtype=np.uint8)
        found.append(np.flatnonzero(block == ord("\n")) + start)
    return np.concatenate(found)


def check_object(value: Any, *, where: str) -> dict[str, Any]:
    """An element that must be an object; raises `BadRecordError`."""
    if not isinstance(value, dict):
        raise BadRecordError(f"{where}: a record must be a JSON object")
    return value
