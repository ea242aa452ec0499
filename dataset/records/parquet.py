"""Owns records of a Parquet file in the published layout."""

from functools import cached_property
from pathlib import Path
from typing import Any

from dataset.records.conversation import (
    BadRecordError,
    Record,
    check_conversation,
    check_stray,
    check_tags,
    parse_json,
)
from dataset.records.fingerprint import file_fingerprint

PARQUET_FIELDS = ("conversations", "image_bytes")


class ParquetRecords:
    """Records of today's published layout: columns `conversations` (JSON) and `image_bytes`."""

    num_blank = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"data_path": self.data_path}  # a spawned worker reads the file for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["data_path"])  # type: ignore[misc]  # there are no subclasses

    def __init__(self, data_path: Path):
        import pyarrow
        import pyarrow.parquet

        self.data_path = data_path
        try:
            self._table = pyarrow.parquet.read_table(data_path, memory_map=True)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{data_path}: not a readable Parquet file ({error})") from None
        for column in PARQUET_FIELDS:
            if column not in self._table.column_names:
                raise ValueError(
                    f"{data_path}: no column {column!r}, only {self._table.column_names}; the "
                    "published layout has 'conversations' and 'image_bytes'"
                )
        if not len(self):
            raise ValueError(f"{data_path}: no records in it")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def where(self, index: int) -> str:
        """ "file:row" of a record, counted from 0."""
        return f"{self.data_path.name}:row {index}"

    def __getitem__(self, index: int) -> Record:
        """The checked record; raises `BadRecordError`."""
        where = self.where(index)
        raw = self._table["conversations"][int(index)].as_py()
        if isinstance(raw, str):
            raw = parse_json(raw, where=f"{where}: conversations")
        messages = check_conversation(raw, where=where)
        images = self._table["image_bytes"][int(index)].as_py() or []
        images = [images] if isinstance(images, bytes) else images
        if not all(isinstance(image, bytes) for image in images):
            raise BadRecordError(f"{where}: 'image_bytes' must be binary or a list of binary")
        fields = {} if images else self._unread_fields(index)
        check_stray(fields, raw, images, read="image_bytes", where=where)
        check_tags(messages, images, where=where)
        return Record(messages, images, where)

    def _unread_fields(self, index: int) -> dict[str, Any]:
        columns = self._table.column_names
        unread = [name for name in columns if name not in PARQUET_FIELDS]
        return {name: self._table[name][int(index)].as_py() for name in unread}

    def read_image(self, image: str | bytes) -> bytes:
        assert isinstance(image, bytes)
        return image

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the records by content, not by path."""
        return file_fingerprint(self.data_path, len(self))
