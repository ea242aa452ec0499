"""Owns several data files as one list of records, with their places as the user typed them."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.examining.faults import LEAVES_FOLDER, UNREADABLE_FILE, Fault, fault_of
from dataset.records.conversation import Record
from dataset.records.reader import open_records

FIX_FLAG: dict[str, Any] = {  # of `--fix_image_count`, which training has too
    "type": int,
    "choices": (0, 1),
    "default": 0,
    "help": "drop <image> tags for which a record has no picture / 去掉多余的 <image>",
}


def named_by(flag: str, error: Exception) -> str:
    """The message of a reader, with another flag than that of training."""
    return re.sub(r"\b(by|see) --data_path\b", rf"\1 {flag}", str(error))


class FaultyRecordError(ValueError):
    """A record that cannot be used, as a fault."""

    def __init__(self, fault: Fault):
        super().__init__(str(fault))
        self.fault = fault

    def __reduce__(self) -> tuple[type["FaultyRecordError"], tuple[Fault]]:
        return type(self), (self.fault,)


class Sources:
    """The records of data files, one file after another.

    A file that cannot be read at all is listed in `faults` and has no records.

    Args:
        paths: data files.
        images_paths: none, one for all, or one for each.
        fix_image_count: drop `<image>` tags for which a record has no picture.
        flag: by what a command names the files; the readers' messages name the flag of training.
    Raises:
        FileNotFoundError: a file or the images of one are not there.
        ValueError: the numbers of files and of image paths do not fit.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        images_paths: Sequence[Path] = (),
        *,
        fix_image_count: bool = False,
        flag: str = "PATH",
    ):
        if len(images_paths) not in (0, 1, len(paths)):
            raise ValueError(
                f"{len(images_paths)} image paths for {len(paths)} data files; name one for all "
                "or one for each"
            )
        self.named = list(paths)
        self.faults: list[Fault] = []
        self.paths: list[Path] = []
        self.records: list[Any] = []
        self._starts = [0]
        places = (
            list(images_paths) if len(images_paths) == len(paths) else [*images_paths] * len(paths)
        )
        for number, path in enumerate(paths):
            images_path = places[number] if places else None
            try:
                records = open_records(path, images_path, fix_image_count=fix_image_count)
            except FileNotFoundError as error:
                raise FileNotFoundError(named_by(flag, error)) from None
            except (ValueError, OSError) as error:
                fault = fault_of(ValueError(named_by(flag, error)), where=str(path))
                self.faults.append(Fault(UNREADABLE_FILE, fault.where, fault.message))
                continue
            self.paths.append(path)
            self.records.append(records)
            self._starts.append(self._starts[-1] + len(records))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def num_blank(self) -> int:
        """Blank lines, which hold no record."""
        return sum(records.num_blank for records in self.records)

    @property
    def emptiness(self) -> list[str]:
        """Lines about files that are passed over, since no record is in them."""
        return [records.emptiness for records in self.records if records.emptiness]

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the file, and of the record in it."""
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def where(self, index: int) -> str:
        """ "path:line" of a record, the path as it was typed."""
        number, own = self.locate(index)
        path, place = self.paths[number], self.records[number].where(own)
        return f"{path}{place[len(path.name) :]}" if place.startswith(path.name) else place

    def fault(self, index: int, error: BaseException) -> FaultyRecordError:
        """An error at a record, to be raised."""
        number, own = self.locate(index)
        named = self.records[number].where(own)
        return FaultyRecordError(fault_of(error, where=self.where(index), named=named))

    def record(self, index: int) -> Record:
        """The checked record; raises `FaultyRecordError`."""
        number, own = self.locate(index)
        try:
            record: Record = self.records[number][own]
        except Exception as error:  # on damaged files the readers' libraries raise almost anything
            raise self.fault(index, error) from error
        for image in record.images:
            if isinstance(image, str) and self._leaves(number, image):
                message = f"image {image[:80]!r} leaves the folder of the images; it is not opened"
                raise FaultyRecordError(Fault(LEAVES_FOLDER, self.where(index), message))
        return record

    def _leaves(self, number: int, name: str) -> bool:
        """Whether the file of a name in a folder, links followed, lies outside that folder."""
        root = getattr(getattr(self.records[number], "images", None), "root", None)
        if root is None or not root.is_dir():
            return False  # names of a zip's members are looked up, not opened
        return not (root / name).resolve().is_relative_to(root.resolve())

    def read_image(self, index: int, image: str | bytes) -> bytes:
        """The bytes of a picture of a record; raises `FaultyRecordError`."""
        number, _ = self.locate(index)
        try:
            content: bytes = self.records[number].read_image(image)
        except Exception as error:
            raise self.fault(index, error) from error
        return content
