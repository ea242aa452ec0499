"""Owns multiple-choice files: the TSV and Parquet layouts of MMBench and MMStar, row by row.

MMBench: columns index, question, hint, A, B, C, D (empty where there are fewer), answer, category,
l2-category, image (base64, or the index of the row that holds it). MMStar: index, question with its
options inside ("... Options: A: red, B: blue"), image (bytes), answer, category, l2_category.
A `Layout` makes such rows of another file's.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset.evaluation.language import detect_language
from dataset.evaluation.table import Row, Table
from dataset.lm_dataset import Sample, make_sample
from dataset.records.conversation import IMAGE_TAG, BadRecordError, Record
from dataset.records.images import ImageFolder, ImageZip

LETTERS = "ABCDEFGHI"
MAX_REFERENCE = 64  # characters: a shorter image cell is the index of another row
OPTIONS = re.compile(r"(?:options|choices|选项)\s*[:：]", re.IGNORECASE)
MARK = re.compile(r"(?:^|(?<=[\s,，;；(（]))([A-I])\s*[:：.)）、]\s*")
MODES = ("letter", "text")  # what is scored: the option's letter, or its text without the list
INSTRUCTIONS = {
    "en": "Answer with the option's letter from the given choices directly.",
    "zh": "请直接回答选项字母。",
}
WORD = "word"  # a third mode: as "text", and one word is asked for
WORD_INSTRUCTION = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Layout:
    """A layout of published files.

    columns: that such a file has. source: where one is published. adapt: makes a row of it one of
    MMBench's layout, in which `question_id` may say which rows ask one question. names_images:
    `image` is the name of a file.
    """

    columns: tuple[str, ...]
    source: str
    adapt: Callable[[Row], Row] = dict
    names_images: bool = False


COMMON = Layout(
    ("question", "answer", "image"),
    "the layout of MMBench (question, A, B, ..., answer, image) or MMStar (question with its "
    "options, answer, image)",
)


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
    question_id: str = ""  # the same for rows that ask one question with its options turned

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
        if mode == WORD:
            lines.append(WORD_INSTRUCTION)
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

    Args:
        flag: that names the path, as errors say it.
        layouts: the first whose columns the file has counts.
        images: where the pictures lie that a layout names.
    Raises:
        FileNotFoundError: no such file.
        ValueError: neither .tsv nor .parquet nor .jsonl, unreadable, or without the columns.
    """

    def __init__(
        self,
        path: Path,
        *,
        flag: str = "--choices",
        layouts: Sequence[Layout] = (COMMON,),
        images: ImageFolder | ImageZip | None = None,
    ):
        self.path, self._images = path, images
        self._table = Table(path, flag=flag)
        self._layout = find_layout(self._table, layouts)
        if self._layout.names_images and images is None:
            raise ValueError(f"{path} names its pictures; say where they lie by --images_path")
        # This reads the whole file once, so that damage is found before hours of scoring.
        self._shared_images = self._read_shared_images()

    def _rows(self) -> Iterator[Row]:
        for row in self._table:
            yield self._layout.adapt(row) | {None: row.get(None, ())}

    def _read_shared_images(self) -> dict[str, str]:
        """The pictures that other rows refer to, by the index of the row that holds them."""
        wanted = {
            image
            for row in self._rows()
            if isinstance(image := row.get("image"), str) and 0 < len(image) <= MAX_REFERENCE
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

    def _choice(self, number: int, row: Row) -> Choice:
        where = f"{self.path.name}:row {number}"
        if any(row.get(None, ())):
            raise BadRecordError(f"{where}: has more cells than the file has columns")
        question = text_of(row.get("question"))
        options = [text_of(row.get(letter)) for letter in LETTERS]
        options = options[: options.index("")] if "" in options else options
        if not options:
            question, options = split_options(question)
        if len(options) < 2:
            raise BadRecordError(
                f"{where}: no options: neither columns A, B, ... nor 'Options: A: ..., B: ...' in "
                "the question"
            )
        answer = text_of(row.get("answer")).strip("().").upper()
        if len(answer) != 1 or answer not in LETTERS[: len(options)]:
            raise BadRecordError(
                f"{where}: answer {answer[:20]!r} is none of {', '.join(LETTERS[: len(options)])}"
                " (a test split comes without answers)"
            )
        l2 = (text_of(row.get(name)) for name in ("l2_category", "l2-category", "L2-category"))
        return Choice(
            index=number,
            where=where,
            question=question,
            hint=text_of(row.get("hint")),
            options=tuple(options),
            answer=LETTERS.index(answer),
            category=text_of(row.get("category")) or "all",
            l2_category=next((name for name in l2 if name), ""),
            image=self._image(row.get("image"), where=where),
            question_id=text_of(row.get("question_id")) or where,
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
        if self._layout.names_images:
            return self._read_image(cell, where=where)
        if len(cell) <= MAX_REFERENCE and cell in self._shared_images:
            cell = self._shared_images[cell]
        try:
            return base64.b64decode(cell.partition("base64,")[2] or cell, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRecordError(f"{where}: its image is not base64 ({error})") from None

    def _read_image(self, name: str, *, where: str) -> bytes:
        assert self._images is not None
        if not self._images.exists(name):
            raise BadRecordError(f"{where}: its image {name!r} {self._images.why_not(name)}")
        try:
            return self._images.read(name)
        except (ValueError, OSError) as error:
            raise BadRecordError(f"{where}: {error}") from error


def find_layout(table: Table, layouts: Sequence[Layout]) -> Layout:
    """The first layout whose columns a table has; raises ValueError where there is none."""
    for layout in layouts:
        if set(layout.columns) <= set(table.columns):
            return layout
    missing = [name for name in layouts[0].columns if name not in table.columns]
    expected = ", or ".join(
        layout.source if layout is COMMON else f"{', '.join(layout.columns)} ({layout.source})"
        for layout in layouts
    )
    raise ValueError(
        f"{table.path}: no column {', '.join(missing)}, only {', '.join(table.columns)[:200]}; "
        f"expected {expected}"
    )


def text_of(cell: Any) -> str:
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
