"""Owns multiple-choice files: the TSV and Parquet layouts of MMBench and MMStar, row by row.

MMBench: columns index, question, hint, A, B, C, D (empty where there are fewer), answer, category,
l2-category, image (base64, or the index of the row that holds it). MMStar: index, question with its
options inside ("... Options: A: red, B: blue"), image (bytes), answer, category, l2_category.
"""

import base64
import binascii
import csv
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from dataset.evaluation.language import detect_language
from dataset.lm_dataset import Sample, make_sample
from dataset.records.conversation import IMAGE_TAG, BadRecordError, Record

LETTERS = "ABCDEFGHI"
REQUIRED = ("question", "answer", "image")
MAX_REFERENCE = 64  # characters: a shorter image cell is the index of another row
MAX_CELL = 1 << 30  # a picture in base64 is one cell
ROWS_AT_ONCE = 16
OPTIONS = re.compile(r"(?:options|choices|选项)\s*[:：]", re.IGNORECASE)
MARK = re.compile(r"(?:^|(?<=[\s,，;；(（]))([A-I])\s*[:：.)）、]\s*")
MODES = ("letter", "text")  # what is scored: the option's letter, or its text without the list
INSTRUCTIONS = {
    "en": "Answer with the option's letter from the given choices directly.",
    "zh": "请直接回答选项字母。",
}


@dataclass(frozen=True)
class Choice:
    """A question about a picture with its options; `answer` is the position of the right one."""

    index: int  # row of the file
    where: str
    question: str
    hint: str
    options: tuple[str, ...]
    answer: int
    category: str
    l2_category: str
    image: bytes

    def turned(self, shift: int) -> "Choice":
        """The same question with its options rotated by `shift`, for circular scoring."""
        num = len(self.options)
        options = tuple(self.options[(i + shift) % num] for i in range(num))
        return replace(self, options=options, answer=(self.answer - shift) % num)

    def prompt(self, mode: str) -> str:
        """The text of the user's message."""
        lines = [IMAGE_TAG, *([self.hint] if self.hint else []), self.question]
        if mode == "letter":
            lines += [f"{LETTERS[i]}. {text}" for i, text in enumerate(self.options)]
            lines.append(INSTRUCTIONS["zh" if detect_language(self.question) == "zh" else "en"])
        return "\n".join(lines)

    def candidates(
        self, processor, pixels: Tensor, *, mode: str = "letter", max_length: int
    ) -> list[Sample]:
        """One conversation for each option, with the option as its answer.

        Raises:
            BadRecordError: a text that cannot be a prompt, or one that is too long.
        """
        prompt, samples = {"role": "user", "content": self.prompt(mode)}, []
        for letter, text in zip(LETTERS, self.options, strict=False):
            reply = {"role": "assistant", "content": letter if mode == "letter" else text}
            record = Record([prompt, reply], [self.image], self.where)
            sample = make_sample(record, pixels, processor, index=self.index, max_length=max_length)
            if sample.is_truncated:
                raise BadRecordError(
                    f"{self.where}: longer than {max_length} tokens; raise --max_seq_len"
                )
            samples.append(sample)
        return samples


class ChoiceFile:
    """A multiple-choice file, read from its beginning each time it is iterated.

    Iterating gives a `Choice` for each row, or the `BadRecordError` that says why there is none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither .tsv nor .parquet, unreadable, or without the columns.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"no multiple-choice file {path}; name it by --choices")
        readers: dict[str, Callable[[], Iterator[dict[str | None, Any]]]] = {
            ".tsv": self._tsv_rows,
            ".parquet": self._parquet_rows,
        }
        if path.suffix not in readers:
            raise ValueError(f"--choices {path}: expected a .tsv or .parquet file")
        self._rows = readers[path.suffix]
        self._check_columns(self._columns())
        # This reads the whole file once, so that damage is found before hours of scoring.
        self._shared_images = self._read_shared_images()

    def _columns(self) -> list[str]:
        if self.path.suffix == ".tsv":
            return next(self._tsv_cells(), [])
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_schema(self.path).names
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{self.path}: not a readable Parquet file ({error})") from None

    def _check_columns(self, columns: list[str]) -> None:
        missing = [name for name in REQUIRED if name not in columns]
        if missing:
            raise ValueError(
                f"{self.path}: no column {', '.join(missing)}, only {', '.join(columns)[:200]}; "
                "expected the layout of MMBench (question, A, B, ..., answer, image) or MMStar "
                "(question with its options, answer, image)"
            )

    def _tsv_rows(self) -> Iterator[dict[str | None, Any]]:
        rows = self._tsv_cells()
        columns = next(rows)
        for cells in filter(None, rows):
            row = dict(zip_longest(columns, cells[: len(columns)]))
            yield row | {None: cells[len(columns) :]}  # as `csv.DictReader` has it

    def _tsv_cells(self) -> Iterator[list[str]]:
        """The cells of each row, the header first; quoted as `pandas.DataFrame.to_csv` does, so
        that a cell may contain tabs and line breaks.

        Raises:
            ValueError: names the line that is no TSV, or has an unclosed quote that swallows rows.
        """
        csv.field_size_limit(MAX_CELL)
        with self._open_tsv() as file:
            reader = csv.reader(self._whole_lines(file), delimiter="\t", strict=True)
            num_columns, line = None, 1
            try:
                for cells in reader:
                    num_columns = num_columns or len(cells)
                    self._check_quotes(cells, num_columns, line=line)
                    yield cells
                    line = reader.line_num + 1
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path}: not a readable TSV file in UTF-8 ({error})"
                ) from None
            except csv.Error as error:
                raise ValueError(self._wrong_quote(line, error)) from None

    def _open_tsv(self) -> IO[str]:
        return open(self.path, encoding="utf-8-sig", newline="")

    def _whole_lines(self, file: Iterable[str]) -> Iterator[str]:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise ValueError(
                    f"{self.path}:{number}: holds a NUL character, so it is damaged or UTF-16; "
                    "save it in UTF-8"
                )
            yield line

    def _check_quotes(self, cells: list[str], num_columns: int, *, line: int) -> None:
        """Raise if an unclosed quote has swallowed rows.

        Then a cell spans several lines and has as many tabs as a row, or, where the quote ends in
        another column, the row has another number of cells.
        """
        for cell in cells:
            num_tabs = cell.count("\t")
            has_rows = "\n" in cell and num_tabs >= num_columns - 1
            if has_rows or (num_tabs and len(cells) != num_columns):
                raise ValueError(self._wrong_quote(line, "it swallows what follows"))

    def _wrong_quote(self, line: int, reason: str | csv.Error) -> str:
        with self._open_tsv() as file:
            text = next(islice(file, line - 1, None))
        return (
            f"{self.path}:{line}: a cell of this row begins with a quote but does not end with one "
            f"({reason}): {text[:80]!r}; double the quotes inside a cell, and put one at both of "
            "its ends, as pandas writes them"
        )

    def _parquet_rows(self) -> Iterator[dict[str | None, Any]]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(ROWS_AT_ONCE):
                    yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self.path}: a damaged Parquet file ({error})") from error

    def _read_shared_images(self) -> dict[str, str]:
        """The pictures that other rows refer to, by the index of the row that holds them."""
        wanted = {
            image
            for row in self._rows()
            if isinstance(image := row["image"], str) and 0 < len(image) <= MAX_REFERENCE
        }
        if not wanted:
            return {}
        return {row["index"]: row["image"] for row in self._rows() if row.get("index") in wanted}

    def __iter__(self) -> Iterator[Choice | BadRecordError]:
        for number, row in enumerate(self._rows()):
            try:
                yield self._choice(number, row)
            except BadRecordError as error:
                yield error

    def _choice(self, number: int, row: dict[str | None, Any]) -> Choice:
        where = f"{self.path.name}:row {number}"
        if any(row.get(None, ())):
            raise BadRecordError(f"{where}: has more cells than the file has columns")
        question = _text(row.get("question"))
        options = [_text(row.get(letter)) for letter in LETTERS]
        options = options[: options.index("")] if "" in options else options
        if not options:
            question, options = split_options(question)
        if len(options) < 2:
            raise BadRecordError(
                f"{where}: no options: neither columns A, B, ... nor 'Options: A: ..., B: ...' in "
                "the question"
            )
        answer = _text(row.get("answer")).strip("().").upper()
        if len(answer) != 1 or answer not in LETTERS[: len(options)]:
            raise BadRecordError(
                f"{where}: answer {answer[:20]!r} is none of {', '.join(LETTERS[: len(options)])}"
                " (a test split comes without answers)"
            )
        l2 = (_text(row.get(name)) for name in ("l2_category", "l2-category", "L2-category"))
        return Choice(
            index=number,
            where=where,
            question=question,
            hint=_text(row.get("hint")),
            options=tuple(options),
            answer=LETTERS.index(answer),
            category=_text(row.get("category")) or "all",
            l2_category=next((name for name in l2 if name), ""),
            image=self._image(row["image"], where=where),
        )

    def _image(self, cell: Any, *, where: str) -> bytes:
        """A picture as base64, the index of another row, bytes, or a dictionary that holds them."""
        if isinstance(cell, dict):
            cell = cell.get("bytes")
        if isinstance(cell, list) and len(cell) == 1:
            return self._image(cell[0], where=where)
        if isinstance(cell, bytes):
            return cell
        if not isinstance(cell, str) or not cell:
            raise BadRecordError(f"{where}: no image")
        if len(cell) <= MAX_REFERENCE and cell in self._shared_images:
            cell = self._shared_images[cell]
        try:
            return base64.b64decode(cell.partition("base64,")[2] or cell, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRecordError(f"{where}: its image is not base64 ({error})") from None


def _text(cell: Any) -> str:
    """A cell as text; an empty one, which some writers call nan, is ""."""
    text = "" if cell is None or cell != cell else str(cell).strip()
    return "" if text.lower() == "nan" else text


def split_options(question: str) -> tuple[str, list[str]]:
    """A question split from the options written in its text, in the order of their letters."""
    heading = list(OPTIONS.finditer(question))
    if not heading:
        return question, []
    listed = question[heading[-1].end() :]
    marks: list[re.Match[str]] = []
    for mark in MARK.finditer(listed):
        if mark[1] == LETTERS[len(marks)]:  # a later "A." within an option is text
            marks.append(mark)
    if not marks:  # the word is part of the question itself
        return question, []
    ends = [mark.start() for mark in marks[1:]] + [len(listed)]
    options = [
        listed[mark.end() : end].strip(" \n\t,，;；(（")
        for mark, end in zip(marks, ends, strict=True)
    ]
    return question[: heading[-1].start()].strip(), options
