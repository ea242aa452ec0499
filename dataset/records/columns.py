"""Owns `ColumnRecords`: what all readers of tables share, whether Parquet or Arrow."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow

from dataset.records.base import Records
from dataset.records.conversation import BadRecordError
from dataset.records.images import ImageFolder, ImageZip, open_images
from dataset.records.layout import LAYOUTS, TURN_FIELDS

IMAGE_COLUMNS = ("image_bytes", "images", "image")


class Row(Mapping[str, Any]):
    """The fields of a row; each is read when it is asked for."""

    def __init__(self, records: "ColumnRecords", index: int):
        self._records, self._index = records, index

    def __getitem__(self, column: str) -> Any:
        if column not in self._records.types:
            raise KeyError(column)
        return self._records.value(column, self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records.types)

    def __len__(self) -> int:
        return len(self._records.types)


class ColumnRecords(Records):
    """Records in the rows of a table.

    A record of text alone may have a picture, 8x8 and all black: it counts as none.

    Args:
        types: of the columns.
        images_path: where pictures lie that a column only names; it need not exist if none does.
    Raises:
        ValueError: no column that can be a conversation or a picture; FileNotFoundError: pictures
            are named and `images_path` is not there.
    """

    image_fields = IMAGE_COLUMNS
    stray_field = "image_bytes"
    is_columnar = True

    def __init__(
        self,
        data_path: Path,
        images_path: Path | None,
        types: dict[str, pyarrow.DataType],
        *,
        fix_image_count: bool = False,
    ):
        self.types = types
        check_columns(data_path, types)
        images = find_images(images_path, types)
        super().__init__(data_path, images, fix_image_count=fix_image_count)

    @abstractmethod
    def _cell(self, column: str, index: int) -> Any:
        """The value of a column in a row; raises ValueError where what holds it is damaged."""

    def value(self, column: str, index: int) -> Any:
        """The value of a column in a row; raises `BadRecordError`."""
        try:
            return self._cell(column, int(index))
        except UnicodeDecodeError as error:
            raise BadRecordError(
                f"{self.where(index)}: column {column!r} is not UTF-8 ({error}); write it as UTF-8"
            ) from error
        except ValueError as error:
            raise BadRecordError(f"{self.where(index)}: {error}") from error

    def where(self, index: int) -> str:
        """ "file:row" of a record, counted from 0."""
        return f"{self.data_path.name}:row {index}"

    def _raw(self, index: int, *, where: str) -> Mapping[str, Any]:
        return Row(self, index)


def check_columns(path: Path, types: dict[str, pyarrow.DataType]) -> None:
    """Raise ValueError unless there are columns for the conversation and for the pictures, which
    may also stand in the parts of messages."""
    turns = next((name for name in TURN_FIELDS if name in types), None)
    missing = None
    if turns is None:
        missing = "no column 'conversations' or 'messages'"
    elif not any(name in types for name in IMAGE_COLUMNS) and not _has_parts(types[turns]):
        missing = "no column 'image_bytes', 'images' or 'image'"
    if missing:
        raise ValueError(f"{path}: {missing}, only {list(types)}; what can be read: {LAYOUTS}")
    kind = types.get("image_bytes")
    if kind is not None and not _holds(kind, _is_bytes):
        raise ValueError(
            f"{path}: column 'image_bytes' is of type {kind}; it must be binary or a list of "
            "binary, the pictures' files as they are"
        )


def find_images(
    images_path: Path | None, types: dict[str, pyarrow.DataType]
) -> ImageFolder | ImageZip | None:
    """Where names of pictures are looked up. Where no column holds names alone, the folder may be
    missing: it is then not needed."""
    names_only = [n for n in IMAGE_COLUMNS if n in types and _holds(types[n], _is_text)]
    try:
        return open_images(images_path)
    except FileNotFoundError:
        if names_only:
            raise
        return None


def _holds(kind: pyarrow.DataType, is_wanted: Any) -> bool:
    """Whether a type is wanted, or is a list or dictionary of such a type."""
    types = pyarrow.types
    while is_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return bool(is_wanted(kind) or types.is_null(kind))


def is_list(kind: pyarrow.DataType) -> bool:
    """Whether a type is any of the lists of Arrow."""
    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_bytes(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_struct(kind):  # of `datasets`
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    views = types.is_binary_view(kind) or types.is_fixed_size_binary(kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or views)


def _is_text(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _has_parts(kind: pyarrow.DataType) -> bool:
    """Whether the contents of messages are lists of typed parts."""
    if not is_list(kind) or not pyarrow.types.is_struct(kind.value_type):
        return False
    turn = kind.value_type
    fields = [turn.field(i) for i in range(turn.num_fields)]
    return any(is_list(field.type) for field in fields if field.name in ("content", "value"))
