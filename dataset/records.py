"""Owns random access to records (JSONL, Parquet) and to their images.

A record is checked here for everything that can be seen without decoding a picture.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dataset.data_file import check_file, check_text
from dataset.fingerprint import file_fingerprint
from dataset.image_store import open_images
from dataset.stray_images import find_stray

IMAGE_TAG = "<image>"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES["gpt"] = "assistant"  # the first release's names are human and gpt
JSONL_FIELDS = {"conversations", "image", "types"}
PARQUET_FIELDS = ("conversations", "image_bytes")
SCAN_CHUNK_BYTES = 1 << 24
DATASET_DIR = Path(__file__).resolve().parent
DEFAULT_FILES = {
    "pretrain": (("pretrain_data", "pretrain_vlm_data", "pretrain_i2t"), "pretrain_images"),
    "sft": (("sft_data", "sft_vlm_data", "sft_i2t"), "sft_images"),
    "multi": (("sft_vlm_data_multi",), "sft_multi_images_trans_image"),
}


class BadRecordError(ValueError):
    """A record that cannot be used; the message begins with where it stands."""


@dataclass(frozen=True)
class Record:
    """One checked conversation.

    `images` are names below the images path, or the encoded bytes themselves; `types` says, where
    the record does, what kind of question each answer belongs to.
    """

    messages: list[dict]
    images: list[str | bytes]
    where: str
    types: tuple[str, ...] = ()


def default_data_paths(kind: str) -> tuple[Path, Path]:
    """Data file and image folder of "pretrain", "sft" or "multi": the first that exists.

    Raises:
        FileNotFoundError: none exists; says where data is expected.
    """
    names, images = DEFAULT_FILES[kind]
    for name in names:
        for suffix in (".jsonl", ".parquet"):
            path = DATASET_DIR / (name + suffix)
            if path.is_file():
                return path, DATASET_DIR / images
    raise FileNotFoundError(
        f"no training data: expected {DATASET_DIR / names[0]}.jsonl with its images in "
        f"{DATASET_DIR / images}; fetch it by `python dataset/download.py`, or name other files by "
        "--data_path and --images_path"
    )


def check_conversation(raw, *, where: str) -> list[dict]:
    """A conversation of either format generation as `{"role", "content"}` messages.

    Raises:
        BadRecordError: not a list, an unknown role, text that is not a string, no answer.
    """
    if not isinstance(raw, list) or not raw:
        raise BadRecordError(f"{where}: 'conversations' must be a list of at least one message")
    messages = []
    for turn, message in enumerate(raw, 1):
        if not isinstance(message, dict):
            raise BadRecordError(f"{where}: message {turn} is not an object with role and content")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecordError(
                f"{where}: message {turn} has role {role!r}; allowed are {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            hint = ", but a list: write it as text and name the pictures in 'image'"
            raise BadRecordError(
                f"{where}: message {turn} has no text in 'content' (or 'value')"
                f"{hint if isinstance(content, list) else ''}"
            )
        role = ROLES[role]
        if role == "system" and turn > 1:
            raise BadRecordError(f"{where}: message {turn} is a system message; it must be first")
        if role == "assistant" and IMAGE_TAG in content:
            raise BadRecordError(f"{where}: message {turn}, an answer, holds {IMAGE_TAG}")
        messages.append({"role": role, "content": content})
    if all(m["role"] != "assistant" for m in messages):
        raise BadRecordError(f"{where}: no assistant message, so nothing to learn from")
    return messages


def decode(line: bytes, *, where: str) -> str:
    """A line as text, without a byte order mark; raises `BadRecordError` where it is not UTF-8."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from None


def parse_json(text: str, *, where: str):
    """What a text says in JSON; raises `BadRecordError`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"{where}: not valid JSON ({error}); mend or delete it") from None


def check_stray(fields: dict, turns: list[dict], images: list, *, read: str, where: str) -> None:
    """Raise `BadRecordError` where a picture stands in none of the fields that are read.

    One whose `images` are read may name them once more elsewhere, by their addresses for instance:
    each of its tags has its image.

    Args:
        fields: of the record, those that are not read.
        turns: its messages as they stand in the file.
        read: the field that is.
    """
    stray = find_stray({} if images else fields, turns, image_tag=IMAGE_TAG)
    if stray:
        raise BadRecordError(
            f"{where}: {stray}; put pictures into {read!r}, with {IMAGE_TAG} where each belongs"
        )


def check_tags(messages: list[dict], images: list, *, where: str) -> None:
    """Raise `BadRecordError` unless there is exactly one `<image>` tag per image."""
    num_tags = sum(m["content"].count(IMAGE_TAG) for m in messages)
    if num_tags != len(images):
        names = ", ".join(
            shorten(image) if isinstance(image, str) else f"{len(image)} bytes"
            for image in images[:3]
        )
        raise BadRecordError(
            f"{where}: {num_tags} {IMAGE_TAG} tag(s) but {len(images)} image(s) [{names}]; "
            "give every tag exactly one image"
        )


def shorten(name: str, *, limit: int = 80) -> str:
    """A name in quotes, cut where it is too long to read."""
    return repr(name if len(name) <= limit else name[:limit] + "...")


class JsonlRecords:
    """Records of a JSONL file, found by an index of line offsets.

    Blank lines hold no record; `num_blank` counts them and `where` keeps the real line numbers.
    """

    def __init__(self, data_path: Path, images_path: Path | None):
        check_text(data_path)
        self.data_path = data_path
        self.images = open_images(images_path)
        offsets = [np.zeros(1, dtype=np.int64)]
        with open(data_path, "rb") as file:
            base = 0
            while chunk := file.read(SCAN_CHUNK_BYTES):
                breaks = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
                offsets.append(breaks + base + 1)
                base += len(chunk)
        bounds = np.concatenate(offsets)
        if bounds[-1] != base:
            bounds = np.append(bounds, base)
        self._fd_owner, self._fd = None, None
        lengths = np.diff(bounds)
        filled = lengths > 0
        for line in np.flatnonzero(lengths <= 8):  # short enough to be nothing but white space
            filled[line] = bool(self._read(bounds[line], lengths[line]).strip())
        self._starts, self._lengths = bounds[:-1][filled], lengths[filled]
        self._line_numbers = np.flatnonzero(filled) + 1
        self.num_blank = len(lengths) - len(self._starts)
        if not len(self):
            raise ValueError(f"{data_path}: no records in it")

    def _read(self, start: int, length: int) -> bytes:
        if self._fd_owner != os.getpid():
            self._fd, self._fd_owner = open(self.data_path, "rb"), os.getpid()
        self._fd.seek(int(start))
        return self._fd.read(int(length))

    def __getstate__(self):
        return self.__dict__ | {"_fd": None, "_fd_owner": None}

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        """ "file:line" of a record."""
        return f"{self.data_path.name}:{self._line_numbers[index]}"

    def __getitem__(self, index: int) -> Record:
        """The checked record; raises `BadRecordError`."""
        where = self.where(index)
        line = self._read(self._starts[index], self._lengths[index])
        raw = parse_json(decode(line, where=where), where=where)
        if not isinstance(raw, dict):
            raise BadRecordError(f"{where}: a record must be a JSON object")
        messages = check_conversation(raw.get("conversations"), where=where)
        images = self._image_names(raw.get("image"), where=where)
        fields = {name: value for name, value in raw.items() if name not in JSONL_FIELDS}
        check_stray(fields, raw["conversations"], images, read="image", where=where)
        check_tags(messages, images, where=where)
        for name in images:
            if not self.images.exists(name):
                raise BadRecordError(
                    f"{where}: image {shorten(name)} is not in {self.images.root} as a file (in "
                    "a zip, a name that several folders have needs its folder); add it, or name "
                    "the right --images_path"
                )
        types = raw.get("types")
        has_types = isinstance(types, list) and all(isinstance(t, str) for t in types)
        return Record(messages, images, where, tuple(types) if has_types else ())

    def _image_names(self, image, *, where: str) -> list[str]:
        """The `image` field: absent or empty, one name, names joined by commas, or a list."""
        if image in (None, "", []):
            return []
        if self.images is None:
            raise BadRecordError(f"{where}: has an image but no --images_path was given")
        if isinstance(image, str):
            if "," not in image or self.images.exists(image):
                return [image.strip()]
            return [name.strip() for name in image.split(",") if name.strip()]
        if isinstance(image, list) and all(isinstance(name, str) for name in image):
            return image
        raise BadRecordError(f"{where}: 'image' must be a file name, or several joined by commas")

    def read_image(self, image: str | bytes) -> bytes:
        return self.images.read(image)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the records' content, wherever the file lies."""
        return file_fingerprint(self.data_path, len(self))


class ParquetRecords:
    """Records of today's published layout: columns `conversations` (JSON) and `image_bytes`."""

    num_blank = 0

    def __getstate__(self):
        return {"data_path": self.data_path}  # a spawned worker reads the file for itself

    def __setstate__(self, state):
        self.__init__(state["data_path"])

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
        return self._table.num_rows

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

    def _unread_fields(self, index: int) -> dict:
        columns = self._table.column_names
        unread = [name for name in columns if name not in PARQUET_FIELDS]
        return {name: self._table[name][int(index)].as_py() for name in unread}

    def read_image(self, image: str | bytes) -> bytes:
        return image

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the records' content, wherever the file lies."""
        return file_fingerprint(self.data_path, len(self))


def open_records(data_path: Path, images_path: Path | None) -> JsonlRecords | ParquetRecords:
    """Open a data file by its suffix.

    Raises:
        FileNotFoundError: the file or its images are missing.
        ValueError: no regular file, unreadable, or without a record.
    """
    check_file(data_path, what="data file", flag="--data_path")
    if data_path.suffix == ".parquet":
        return ParquetRecords(data_path)
    return JsonlRecords(data_path, images_path)
