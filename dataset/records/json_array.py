"""Owns records of a JSON array, the layout of LLaVA: random access by an index of its elements."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset.records.index_file import Index
from dataset.records.jsonl import JsonlRecords

PARSE_CHUNK_BYTES = 1 << 22
LARGEST_ELEMENT = 1 << 26  # characters of a record
WITHIN_CHARACTER = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin none
SPACES = re.compile(r"[ \t\n\r]*")


class JsonArrayRecords(JsonlRecords):
    """Records of a JSON array, as LLaVA's files are.

    Raises:
        ValueError: it is not valid JSON up to its end.
    """

    def _make_index(self) -> Index:
        return index_array(self.data_path)

    def _count_blank(self) -> int:
        return 0

    def where(self, index: int) -> str:
        """ "file:record" with the number of a record, counted from 0."""
        return f"{self.data_path.name}:record {index}"


def index_array(path: Path) -> Index:
    """Where the elements of a JSON array lie: (N, 3), numbered from 0."""
    places = list(_elements(path))
    found = np.array(places, dtype=np.int64).reshape(-1, 2)
    return np.concatenate([found, np.arange(len(found))[:, None]], axis=1)


def _elements(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and length in bytes of each element, without reading the file as a whole."""
    text, number = Window(path), 0
    text.take_mark("[", number)
    if text.next_is("]"):
        text.take_mark("]", number)
    else:
        while True:
            yield text.take_value(number)
            number += 1
            if text.next_is("]"):
                text.take_mark("]", number)
                break
            text.take_mark(",", number)
    if text.peek():
        raise text.fault(number, f"{text.peek()!r} stands behind the end of the array")


class Window:
    """A part of a text file that is read from its beginning to its end."""

    def __init__(self, path: Path):
        self._path, self._file = path, open(path, encoding="utf-8-sig", newline="")
        with open(path, "rb") as file:
            self._start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # behind the mark
        self._text, self._place = "", 0
        self._offset = self._start  # where `_place` is in the file, in bytes
        self._parse = json.JSONDecoder().raw_decode

    def fault(self, number: int, why: str) -> ValueError:
        """The error for a file that is no JSON array from a record on, where it has come to."""
        return ValueError(
            f"{self._path}: no valid JSON array at record {number} (counted from 0): {why}: "
            f"{self._position()}; mend or fetch the file again"
        )

    def _position(self) -> str:
        """The place in the file; found only now, since counting lines takes time."""
        line = column = 1
        with open(self._path, "rb") as file:
            file.seek(self._start)
            while block := file.read(min(PARSE_CHUNK_BYTES, self._offset - file.tell())):
                line += block.count(b"\n")
                _, mark, behind = block.rpartition(b"\n")
                column = (1 if mark else column) + len(behind.translate(None, WITHIN_CHARACTER))
        return f"line {line} column {column} (byte {self._offset})"

    def _advance(self, place: int) -> int:
        """Move on to a place of the text; returns the number of bytes in between."""
        length = len(self._text[self._place : place].encode())
        self._place, self._offset = place, self._offset + length
        return length

    def _more(self) -> bool:
        """Read on; False at the end of the file."""
        try:
            read = self._file.read(max(PARSE_CHUNK_BYTES, len(self._text) - self._place))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}: not UTF-8 ({error}); save it as UTF-8") from None
        self._text, self._place = self._text[self._place :] + read, 0
        return bool(read)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            match = SPACES.match(self._text, self._place)
            assert match is not None
            self._advance(match.end())
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def next_is(self, mark: str) -> bool:
        return self.peek() == mark

    def take_mark(self, mark: str, number: int) -> None:
        if not self.next_is(mark):
            found = repr(self.peek()) if self.peek() else "the end of the file"
            raise self.fault(number, f"{mark!r} wanted, {found} found")
        self._advance(self._place + 1)

    def take_value(self, number: int) -> tuple[int, int]:
        """Offset and length in bytes of the value that begins here."""
        self.peek()
        while True:
            try:
                _, end = self._parse(self._text, self._place)
            except (ValueError, RecursionError) as error:
                is_long = len(self._text) - self._place > LARGEST_ELEMENT
                num_good = getattr(error, "pos", self._place) - self._place
                if is_long or not self._more():
                    self._advance(self._place + num_good)
                    raise self.fault(number, getattr(error, "msg", str(error))) from None
                continue
            if end == len(self._text) and self._more():
                continue  # a number may go on
            start = self._offset
            return start, self._advance(end)
