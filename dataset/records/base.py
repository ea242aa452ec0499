"""Owns `Records`, the face of every reader: records by number, checked, with their pictures."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dataset.records.conversation import (
    BadRecordError,
    Record,
    carries_tools,
    check_conversation,
    check_stray,
    count_tags,
    shorten,
)
from dataset.records.data_file import emptiness_of
from dataset.records.fingerprint import ends_fingerprint, files_fingerprint
from dataset.records.images import ImageFolder, ImageZip
from dataset.records.layout import (
    find_pictures,
    find_turns,
    join_parts,
    list_pictures,
    match_tags,
    read_json_turns,
    read_types,
    split_names,
)
from dataset.records.stand_in import is_stand_in


class Records(ABC):
    """Checked records in random access. Readers differ in `_raw` alone.

    data_path: the file or folder. images: where names of pictures are looked up; None if nowhere.
    num_blank: lines without a record. slowness: why reading in random order is slow and what to
    do about it; None: it is not. fix_image_count: drop tags that have no image. empty_files: those
    that hold no record, among others that do.
    """

    image_fields: tuple[str, ...] = ("image", "images")
    stray_field = "image"  # where a picture belongs, in messages
    is_columnar = False  # columns may hold JSON text, and a black picture for none
    is_stream = False  # their numbers are ids, and their order is the stream's own
    num_blank = 0
    slowness: str | None = None
    empty_files: tuple[Path, ...] = ()

    def __init__(
        self,
        data_path: Path,
        images: ImageFolder | ImageZip | None,
        *,
        fix_image_count: bool = False,
    ):
        self.data_path, self.images = data_path, images
        self.fix_image_count = fix_image_count

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def num_ids(self) -> int:
        """Every number of a record is below this."""
        return len(self)

    @abstractmethod
    def where(self, index: int) -> str:
        """What a record is called in messages: file and place in it."""

    @abstractmethod
    def _raw(self, index: int, *, where: str) -> Mapping[str, Any]:
        """The fields of a record as they stand; raises `BadRecordError`."""

    def __getitem__(self, index: int) -> Record:
        """The checked record; raises `BadRecordError`."""
        if not 0 <= index < len(self):
            raise IndexError(index)  # also what ends a for loop over the records
        where = self.where(index)
        raw = self._raw(index, where=where)
        turn_field, turns = find_turns(raw, where=where)
        if self.is_columnar:
            turns = read_json_turns(turns, name=turn_field, where=where)
        turns, own_pictures = join_parts(turns, where=where)
        messages = check_conversation(turns, where=where)
        images = self._images(raw, own_pictures, where=where)
        if self.is_columnar and len(images) == 1 and not count_tags(messages):
            image = images[0]
            images = [] if isinstance(image, bytes) and is_stand_in(image) else images
        read = {turn_field, "types", *self.image_fields}
        fields = {} if images else {n: raw[n] for n in raw if n not in read}
        check_stray(fields, turns, images, read=self.stray_field, where=where)
        messages = match_tags(messages, images, fix=self.fix_image_count, where=where)
        for name in images:
            if isinstance(name, str):
                self._check_name(name, where=where)
        return Record(
            messages,
            images,
            where,
            types=read_types(raw),
            carries_tools=carries_tools(turns),
        )

    def _images(
        self, raw: Mapping[str, Any], own_pictures: list[Any], *, where: str
    ) -> list[str | bytes]:
        """The pictures in the record's field, or in the typed parts of its messages."""
        name, value = find_pictures(raw, self.image_fields)
        if isinstance(value, str):
            value = split_names(value, self._exists)
        images = list_pictures(value, name=name, where=where)
        if images and own_pictures:
            raise BadRecordError(
                f"{where}: pictures stand in {name!r} and in the parts of its messages; leave "
                "them in one of both"
            )
        return images or list_pictures(own_pictures, name="content", where=where)

    def _exists(self, name: str) -> bool:
        return self.images is not None and self.images.exists(name)

    def _check_name(self, name: str, *, where: str) -> None:
        if self.images is None:
            raise BadRecordError(f"{where}: has an image but no --images_path was given")
        if not self.images.exists(name):
            raise BadRecordError(
                f"{where}: image {shorten(name)} {self.images.why_not(name)}; add it, or name the "
                "right --images_path"
            )

    def read_image(self, image: str | bytes) -> bytes:
        """The encoded picture that a record names or holds.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        if isinstance(image, bytes):
            return image
        assert self.images is not None
        return self.images.read(image)

    def files(self) -> list[Path]:
        """The files that hold the records, in order."""
        return [self.data_path]

    @property
    def emptiness(self) -> str | None:
        """Which files are passed over, in a line; None: none is."""
        return emptiness_of(self.empty_files)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the records by content, not by path."""
        return files_fingerprint(self.files(), len(self))

    @property
    def former_fingerprint(self) -> str:
        """The fingerprint in states of earlier versions, which read single files."""
        is_one = len(self.files()) == 1
        return ends_fingerprint(self.files()[0], len(self)) if is_one else self.fingerprint
