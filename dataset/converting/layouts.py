"""Owns the layouts that are converted: each gives records by number, out of a file or a folder.

A layout has a length, `where(i)`, and `record(i)`, which reads one record with its pictures and
raises `ValueError` for one that cannot be used; `faults` are those of the source as a whole. It can
be sent to another process.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dataset.converting.json_index import JsonArray, check_object
from dataset.converting.output import PlainRecord, plain_messages, plain_record
from dataset.converting.pictures import SourcePictures
from dataset.examining.faults import Fault
from dataset.examining.sources import Sources
from dataset.records.conversation import (
    IMAGE_TAG,
    BadRecordError,
    Message,
    check_conversation,
    check_stray,
    check_tags,
    count_tags,
)
from dataset.records.layout import (
    find_pictures,
    find_turns,
    join_parts,
    list_pictures,
    match_tags,
    read_types,
    split_names,
)
from dataset.records.open_files import OpenedAtNeed
from dataset.records.parquet_pages import ParquetPages

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
COCO_NAMES = ("COCO_train2014_", "COCO_val2014_", "COCO_test2015_", "")  # before a picture's id


class Layout(Protocol):
    """What gives records; see the module."""

    faults: list[Fault]

    def __len__(self) -> int: ...

    def where(self, index: int) -> str: ...

    def record(self, index: int) -> PlainRecord: ...


class OwnRecords:
    """Records that are read without conversion: JSON lines, and today's Parquet layout."""

    def __init__(self, sources: Sources):
        self.sources, self.faults = sources, sources.faults

    def __len__(self) -> int:
        return len(self.sources)

    def where(self, index: int) -> str:
        return self.sources.where(index)

    def record(self, index: int) -> PlainRecord:
        record = self.sources.record(index)
        return plain_record(record, [self.sources.read_image(index, i) for i in record.images])


class JsonLayout:
    """What the layouts in JSON arrays share: one record an element."""

    def __init__(self, elements: JsonArray, pictures: SourcePictures):
        self.elements, self.pictures = elements, pictures
        self.faults: list[Fault] = []
        if elements.cut_at is not None:
            where = f"{elements.path}:{elements.cut_at}"
            message = "the file ends before its end: an array in it is not closed"
            self.faults.append(Fault("not JSON", where, message))

    def __len__(self) -> int:
        return len(self.elements)

    def where(self, index: int) -> str:
        return self.elements.where(index)


class ShareGpt(JsonLayout):
    """LLaVA's and ShareGPT's arrays: `conversations` or `messages`, `image` or `images`.

    Args:
        fix_image_count: drop `<image>` tags for which a record has no picture.
    """

    def __init__(self, elements: JsonArray, pictures: SourcePictures, *, fix_image_count: bool):
        super().__init__(elements, pictures)
        self.fix_image_count = fix_image_count

    def record(self, index: int) -> PlainRecord:
        where = self.where(index)
        fields = check_object(self.elements[index], where=where)
        field, turns = find_turns(fields, where=where)
        turns, own_pictures = join_parts(turns, where=where)
        messages = check_conversation(turns, where=where)
        kind, value = find_pictures(fields, ("image", "images"))
        if isinstance(value, str):
            value = split_names(value, self.pictures.exists)
        names = list_pictures(value or own_pictures, name=kind, where=where)
        others = {k: v for k, v in fields.items() if k not in (field, kind)}
        check_stray(others, turns, names, read=kind, where=where)
        messages = match_tags(messages, names, fix=self.fix_image_count, where=where)
        pictures = [one if isinstance(one, bytes) else self.pictures.read(one) for one in names]
        return PlainRecord(plain_messages(messages), pictures, read_types(fields))


class CocoCaptions(JsonLayout):
    """COCO's captions: one record a caption.

    Args:
        names: file of a picture by its id, in the array `images`.
        prompt: the question of every record, in which the picture comes first.
    """

    def __init__(
        self, elements: JsonArray, pictures: SourcePictures, names: dict[Any, str], prompt: str
    ):
        super().__init__(elements, pictures)
        self.names, self.prompt = names, prompt

    def record(self, index: int) -> PlainRecord:
        where = self.where(index)
        fields = check_object(self.elements[index], where=where)
        number = fields.get("image_id")
        name = self.names.get(number) if isinstance(number, int | str) else None
        if name is None:
            raise BadRecordError(f"{where}: no such image {number!r} in 'images'")
        messages = ask(self.prompt, fields.get("caption"), where=where)
        return PlainRecord(messages, [self.pictures.read(name)])


class Vqa(JsonLayout):
    """VQA v2's questions with the answers of another file: one record a question.

    Args:
        answers: the element of `annotations` by question id.
    """

    def __init__(
        self,
        elements: JsonArray,
        pictures: SourcePictures,
        annotations: JsonArray,
        answers: dict[Any, int],
    ):
        super().__init__(elements, pictures)
        self.annotations, self.answers = annotations, answers

    def record(self, index: int) -> PlainRecord:
        where = self.where(index)
        fields = check_object(self.elements[index], where=where)
        number, image_id = fields.get("question_id"), fields.get("image_id")
        if not isinstance(number, int | str) or number not in self.answers:
            raise BadRecordError(f"{where}: no answer to question {number!r} in --annotations")
        place = self.answers[number]
        answer_where = self.annotations.where(place)
        annotation = check_object(self.annotations[place], where=answer_where)
        messages = ask(
            fields.get("question"), annotation.get("multiple_choice_answer"), where=where
        )
        if not isinstance(image_id, int):
            raise BadRecordError(f"{where}: no such image {image_id!r}: an id is a number")
        names = [f"{prefix}{image_id:012d}.jpg" for prefix in COCO_NAMES]
        name = next((name for name in names if self.pictures.exists(name)), names[-1])
        return PlainRecord(messages, [self.pictures.read(name)])


class TextBeside:
    """Pictures of a folder, each with its caption in a text file of the same name."""

    def __init__(self, folder: Path, prompt: str):
        self.folder, self.prompt = folder, prompt
        self.faults: list[Fault] = []
        self.pictures = SourcePictures(folder)
        self.names = sorted(
            os.path.relpath(os.path.join(base, name), folder)
            for base, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(SUFFIXES)
        )

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def record(self, index: int) -> PlainRecord:
        where, name = self.where(index), self.names[index]
        beside = Path(name).with_suffix(".txt")
        if not (self.folder / beside).exists():
            raise BadRecordError(f"{where}: no text beside it ({beside.name})")
        try:
            caption = self.pictures.read(str(beside)).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadRecordError(f"{where}: {beside.name} is not UTF-8 ({error})") from None
        return PlainRecord(ask(self.prompt, caption, where=where), [self.pictures.read(name)])


class FineVision:
    """Parquet of FineVision and the Cauldron: `images`, and `texts` of {user, assistant}."""

    def __init__(self, path: Path, *, fix_image_count: bool):
        self.fix_image_count = fix_image_count
        self.path, self._pages = path, OpenedAtNeed(partial(ParquetPages, path))
        self.num_rows = self._pages.get().num_rows
        self.faults: list[Fault] = []

    def __len__(self) -> int:
        return self.num_rows

    def where(self, index: int) -> str:
        return f"{self.path}:row {index}"

    def record(self, index: int) -> PlainRecord:
        where = self.where(index)
        texts, images = (self._pages.get().value(name, index) for name in ("texts", "images"))
        if not isinstance(texts, list) or not all(isinstance(turn, dict) for turn in texts):
            raise BadRecordError(f"{where}: 'texts' must be a list of user and assistant")
        turns = [
            {"role": role, "content": turn.get(role)}
            for turn in texts
            for role in ("user", "assistant")
        ]
        messages = check_conversation(turns, where=where)
        contents = [_encoded(image, where=where) for image in images or []]
        if contents and not count_tags(messages):
            first = messages[0]
            first["content"] = f"{IMAGE_TAG}\n" * len(contents) + first["content"]
        messages = match_tags(messages, contents, fix=self.fix_image_count, where=where)
        return PlainRecord(plain_messages(messages), contents)


class Joined:
    """Several layouts as one, one after another.

    Args:
        emptiness: which files were passed over, in a line; None: none was.
    """

    def __init__(self, layouts: Sequence[Layout], emptiness: str | None = None):
        self.layouts, self.emptiness = list(layouts), emptiness
        self.faults = [fault for layout in layouts for fault in layout.faults]
        self._places = [(n, len(layout)) for n, layout in enumerate(layouts)]

    def __len__(self) -> int:
        return sum(length for _, length in self._places)

    def _locate(self, index: int) -> tuple[Layout, int]:
        for number, length in self._places:
            if index < length:
                return self.layouts[number], index
            index -= length
        raise IndexError(index)

    def where(self, index: int) -> str:
        layout, own = self._locate(index)
        return layout.where(own)

    def record(self, index: int) -> PlainRecord:
        layout, own = self._locate(index)
        return layout.record(own)


def ask(question: Any, answer: Any, *, where: str) -> list[Message]:
    """A question about one picture and its answer; raises `BadRecordError` if one is missing."""
    if not isinstance(question, str) or not question.strip():
        raise BadRecordError(f"{where}: has no text in its question")
    if not isinstance(answer, str) or not answer.strip():
        raise BadRecordError(f"{where}: no answer or caption, or an empty one")
    content = question if IMAGE_TAG in question else f"{IMAGE_TAG}\n{question}"
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer.strip()},
    ]
    messages = check_conversation(turns, where=where)
    check_tags(messages, ["the picture"], where=where)
    return messages


def _encoded(image: Any, *, where: str) -> bytes:
    """The bytes of a picture as `datasets` writes it: {bytes, path}, or bytes."""
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise BadRecordError(f"{where}: 'images' must be pictures as {{bytes, path}} or bytes")
    return content
