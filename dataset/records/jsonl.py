"""Owns records of a JSONL file: random access by an index of line offsets."""

import os
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from dataset.records.conversation import (
    BadRecordError,
    Record,
    carries_tools,
    check_conversation,
    check_stray,
    check_tags,
    decode,
    parse_json,
    shorten,
)
from dataset.records.data_file import check_text
from dataset.records.fingerprint import file_fingerprint
from dataset.records.images import open_images

JSONL_FIELDS = {"conversations", "image", "types"}
SCAN_CHUNK_BYTES = 1 << 24


class JsonlRecords:
    """Records of a JSONL file, found by an index of line offsets.

    Blank lines hold no record; `num_blank` counts them and `where` keeps the real line numbers.
    """

    slowness = None  # see `ParquetRecords`

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
        self._fd: BufferedReader | None = None
        self._fd_owner: int | None = None  # process id: each process opens the file for itself
        lengths = np.diff(bounds)
        filled = lengths > 0
        for line in np.flatnonzero(lengths <= 8):  # longer lines are not checked for white space
            filled[line] = bool(self._read(bounds[line], lengths[line]).strip())
        self._starts, self._lengths = bounds[:-1][filled], lengths[filled]
        self._line_numbers = np.flatnonzero(filled) + 1
        self.num_blank = len(lengths) - len(self._starts)
        if not len(self):
            raise ValueError(f"{data_path}: no records in it")

    def _read(self, start: int, length: int) -> bytes:
        if self._fd is None or self._fd_owner != os.getpid():
            self._fd, self._fd_owner = open(self.data_path, "rb"), os.getpid()
        self._fd.seek(int(start))
        return self._fd.read(int(length))

    def __getstate__(self) -> dict[str, Any]:
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
            if self.images is not None and not self.images.exists(name):
                raise BadRecordError(
                    f"{where}: image {shorten(name)} is not in {self.images.root} as a file (in "
                    "a zip, a name that several folders have needs its folder); add it, or name "
                    "the right --images_path"
                )
        types: Any = raw.get("types")
        has_types = isinstance(types, list) and all(isinstance(t, str) for t in types)
        return Record(
            messages,
            images,
            where,
            types=tuple(types) if has_types else (),
            carries_tools=carries_tools(raw["conversations"]),
        )

    def _image_names(self, image: Any, *, where: str) -> list[str]:
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
        assert self.images is not None and isinstance(image, str)
        return self.images.read(image)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the records by content, not by path."""
        return file_fingerprint(self.data_path, len(self))
