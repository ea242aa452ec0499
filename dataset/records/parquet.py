"""Owns records of a Parquet file in the published layout."""

from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow

from dataset.records.conversation import (
    BadRecordError,
    Record,
    carries_tools,
    check_conversation,
    check_stray,
    check_tags,
    count_tags,
    parse_json,
)
from dataset.records.fingerprint import file_fingerprint
from dataset.records.parquet_pages import HELD_BYTES, ParquetPages
from dataset.records.stand_in import is_stand_in

PARQUET_FIELDS = ("conversations", "image_bytes")


class ParquetRecords:
    """Records of today's published layout: columns `conversations` (JSON) and `image_bytes`.

    A record of text alone may have a picture, 8x8 and all black: it counts as none.
    """

    num_blank = 0

    def __init__(self, data_path: Path):
        self.data_path = data_path
        self._pages = ParquetPages(data_path)
        types = {field.name: field.type for field in self._pages.schema}
        for column in PARQUET_FIELDS:
            if column not in types:
                raise ValueError(
                    f"{data_path}: no column {column!r}, only {list(types)}; the "
                    "published layout has 'conversations' and 'image_bytes'"
                )
        if not _holds_pictures(types["image_bytes"]):
            raise ValueError(
                f"{data_path}: column 'image_bytes' is of type {types['image_bytes']}; it must be "
                "binary or a list of binary, the pictures' files as they are"
            )
        self._unread = [name for name in types if name not in PARQUET_FIELDS]
        if not len(self):
            raise ValueError(f"{data_path}: no records in it")

    def __len__(self) -> int:
        return self._pages.num_rows

    def where(self, index: int) -> str:
        """ "file:row" of a record, counted from 0."""
        return f"{self.data_path.name}:row {index}"

    def __getitem__(self, index: int) -> Record:
        """The checked record; raises `BadRecordError`."""
        where = self.where(index)
        raw = self._value("conversations", index)
        if isinstance(raw, str):
            raw = parse_json(raw, where=f"{where}: conversations")
        messages = check_conversation(raw, where=where)
        images = self._value("image_bytes", index) or []
        images = [images] if isinstance(images, bytes) else images
        if not all(isinstance(image, bytes) for image in images):
            raise BadRecordError(f"{where}: 'image_bytes' must be binary or a list of binary")
        if len(images) == 1 and not count_tags(messages) and is_stand_in(images[0]):
            images = []
        fields = {} if images else {name: self._value(name, index) for name in self._unread}
        check_stray(fields, raw, images, read="image_bytes", where=where)
        check_tags(messages, images, where=where)
        return Record(messages, images, where, carries_tools=carries_tools(raw))

    def _value(self, column: str, index: int) -> Any:
        try:
            return self._pages.value(column, int(index))
        except ValueError as error:
            raise BadRecordError(f"{self.where(index)}: {error}") from error

    @property
    def slowness(self) -> str | None:
        """Why records are slow to read in random order, and what to do about it; None: they are
        not."""
        sizes = self._pages.dictionary_sizes("image_bytes")
        size = sum(sizes)
        if size <= HELD_BYTES or len(sizes) == 1:
            return None
        return (
            f"{self.data_path.name}: the dictionaries of 'image_bytes' take {size / 2**20:.0f} MiB "
            f"and {HELD_BYTES / 2**20:.0f} are kept, so reading in random order is slow; write "
            "the file again by pyarrow.parquet.write_table(..., use_dictionary=False)"
        )

    def read_image(self, image: str | bytes) -> bytes:
        assert isinstance(image, bytes)
        return image

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the records by content, not by path."""
        return file_fingerprint(self.data_path, len(self))


def _holds_pictures(kind: pyarrow.DataType) -> bool:
    """Whether a column's type is binary or a list of it, large or as a dictionary."""
    types = pyarrow.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    inner = kind.value_type if is_list or types.is_dictionary(kind) else kind
    inner = inner.value_type if types.is_dictionary(inner) else inner
    return bool(types.is_binary(inner) or types.is_large_binary(inner) or types.is_null(inner))
