"""Owns tables of pictures and captions, CSV or TSV, by row without reading them into memory."""

import csv
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from dataset.converting.layouts import ask
from dataset.converting.output import PlainRecord
from dataset.converting.pictures import SourcePictures
from dataset.examining.faults import Fault
from dataset.records.conversation import BadRecordError, decode

IMAGE_COLUMNS = ("image", "image_path", "image_name", "file_name", "filename", "filepath", "file",
                 "path", "img")  # fmt: skip
CAPTION_COLUMNS = ("caption", "text", "description", "comment", "title")


class CsvCaptions:
    """A table with a header, one column of which names pictures and one holds captions.

    Raises:
        ValueError: no such columns.
    """

    def __init__(self, path: Path, pictures: SourcePictures, prompt: str):
        self.path, self.pictures, self.prompt = path, pictures, prompt
        self.faults: list[Fault] = []
        numbers = itertools.chain.from_iterable(_rows(path, self._delimiter()))
        places = np.fromiter(numbers, dtype=np.int64).reshape(-1, 3)
        header = []
        if len(places):
            header = self._parse(int(places[0, 0]), int(places[0, 1]), where=f"{path}:1")
        self.image = _column(header, IMAGE_COLUMNS, path=path)
        self.caption = _column(header, CAPTION_COLUMNS, path=path)
        self._places = places[1:]

    def _delimiter(self) -> str:
        return "\t" if self.path.suffix.lower() == ".tsv" else ","

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._places[index][2]}"

    def record(self, index: int) -> PlainRecord:
        where = self.where(index)
        start, end, _ = self._places[index]
        row = self._parse(int(start), int(end), where=where)
        if max(self.image, self.caption) >= len(row):
            raise BadRecordError(f"{where}: no caption or image in it: {len(row)} field(s)")
        messages = ask(self.prompt, row[self.caption], where=where)
        return PlainRecord(messages, [self.pictures.read(row[self.image].strip())])

    def _parse(self, start: int, end: int, *, where: str) -> list[str]:
        with open(self.path, "rb") as file:
            file.seek(start)
            text = decode(file.read(end - start), where=where)
        try:
            return next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter()), [])
        except csv.Error as error:
            raise BadRecordError(f"{where}: not a row of a table ({error})") from None


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, int, int]]:
    """Where each row begins and ends, in bytes, and its first line; blank rows are left out."""
    with open(path, "rb") as file:
        reader = csv.reader(_lines(file), delimiter=delimiter)
        for _ in itertools.count():
            start, line = file.tell(), reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                row = ["a row that `_parse` refuses with its line"]
            if row:
                yield start, file.tell(), line


def _lines(file: IO[bytes]) -> Iterator[str]:
    """Lines of a file, read one by one. What parts fields is ASCII, so no byte is decoded yet."""
    while line := file.readline():
        yield line.decode("latin-1")


def _column(header: list[str], names: tuple[str, ...], *, path: Path) -> int:
    found = {title.strip().lower(): number for number, title in enumerate(header)}
    for name in names:
        if name in found:
            return found[name]
    raise ValueError(
        f"{path}: no column {' or '.join(map(repr, names[:2]))} in its first row, only "
        f"{[title[:40] for title in header[:12]]}"
    )
