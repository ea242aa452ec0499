"""Owns reading a data set's encoded pictures from a folder, or from a zip file in place.

Nothing outside the folder is opened: neither by a name nor by a link, and nothing but regular
files. A picture's file may be of `MAX_IMAGE_BYTES`.
"""

import os
import stat
import struct
import zipfile
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dataset.records.conversation import shorten
from dataset.records.zip_members import ZipMembers

MAX_IMAGE_BYTES = 1 << 28
NUM_FOUND = 64
AS_A_FILE = "is not in {} as a file"
OUTSIDE = "leads out of {}, and nothing outside it is opened: copy it into the folder"


class ImageFolder:
    """Images as files below a folder; a name may lead through its sub-folders."""

    def __init__(self, root: Path):
        self.root = root

    @cached_property
    def _real_root(self) -> str:
        return os.path.join(os.path.realpath(self.root), "")

    def _place(self, name: str) -> str | None:
        """The real path of a name; None if it leads out of the folder or cannot be one."""
        place = os.path.join(self._real_root, name)
        is_plain = os.path.basename(name) == name and name not in ("", os.curdir, os.pardir)
        if is_plain and not os.path.islink(place):
            return place  # at a third of the time
        try:
            place = os.path.realpath(place)
        except (OSError, ValueError):  # a NUL in it
            return None
        return place if place.startswith(self._real_root) else None

    def exists(self, name: str) -> bool:
        """Whether a name is that of a regular file in the folder."""
        place = self._place(name)
        try:
            return place is not None and stat.S_ISREG(os.stat(place).st_mode)
        except (OSError, ValueError):
            return False

    def why_not(self, name: str) -> str:
        """Why a name that does not exist cannot be read, to be put behind it in a sentence."""
        is_outside = self._place(name) is None and os.path.lexists(self._real_root + name[:255])
        is_outside |= os.path.isabs(name) or ".." in Path(name).parts
        return (OUTSIDE if is_outside else AS_A_FILE).format(self.root)

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            ValueError: it leads out of the folder, is too large, or a FIFO or device of that name:
                reading it could block for ever.
            OSError: it cannot be read.
        """
        place = self._place(name)
        if place is None:
            raise ValueError(f"{shorten(name)} {OUTSIDE.format(self.root)}")
        about = os.stat(place)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(
                f"{shorten(name)[1:-1]} in {self.root} is a folder, FIFO or device, not a file"
            )
        check_size(about.st_size, name=name)
        with open(place, "rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}


class ImageZip:
    """Images as members of a zip file, read in place; raises ValueError for a damaged one."""

    def __init__(self, root: Path):
        self.root = root
        self._members = ZipMembers(root)
        self._found: dict[str, zipfile.ZipInfo | None] = {}  # last, as names are asked for twice

    def _find(self, name: str) -> zipfile.ZipInfo | None:
        if name in self._found:
            return self._found[name]
        if len(self._found) >= NUM_FOUND:
            self._found.clear()
        try:
            return self._found.setdefault(name, self._members.find(name))
        except (struct.error, ValueError) as error:
            raise ValueError(f"{self.root}: not a readable zip file ({error})") from error

    def exists(self, name: str) -> bool:
        """Whether a member has the name, or alone has it behind its folder."""
        return self._find(name) is not None

    def why_not(self, name: str) -> str:
        """Why a name that does not exist cannot be read, to be put behind it in a sentence."""
        return AS_A_FILE.format(self.root) + " (a name that several folders have needs its folder)"

    def read(self, name: str) -> bytes:
        """The bytes of a member; raises `ValueError` where it is damaged, encrypted or too large
        once unpacked."""
        member = self._find(name)
        if member is None:
            raise ValueError(f"{shorten(name)} {self.why_not(name)}")
        check_size(member.file_size, name=name)
        try:
            return self._members.read(member)
        except Exception as error:  # zlib, lzma, bz2 and struct each have errors of their own
            why = str(error) or type(error).__name__
            raise ValueError(
                f"{shorten(name)[1:-1]} in {self.root.name} cannot be read ({why})"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return open_zip, (self.root,)


def check_size(num_bytes: int, *, name: str) -> None:
    """Raise ValueError for a picture's file that would fill the memory."""
    if num_bytes > MAX_IMAGE_BYTES:
        raise ValueError(
            f"{shorten(name)} is of {num_bytes / 2**20:,.0f} MiB, and a picture's file may have "
            f"{MAX_IMAGE_BYTES >> 20}: scale it down, or delete it"
        )


def open_zip(root: Path) -> ImageZip:
    """The images of a zip file; one object for all who name it."""
    about = root.stat()
    return _open_zip(Path(os.path.abspath(root)), about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=8)
def _open_zip(root: Path, _size: int, _mtime_ns: int) -> ImageZip:
    return ImageZip(root)


def open_images(
    images_path: Path | None, *, flag: str = "--images_path"
) -> ImageFolder | ImageZip | None:
    """The images of a folder or zip; for a missing folder, its name with `.zip` is tried.

    Raises:
        FileNotFoundError: neither is there. ValueError: the zip is damaged or cut off.
    """
    if images_path is None:
        return None
    if images_path.is_dir():
        return ImageFolder(images_path)
    for path in (images_path, images_path.with_name(images_path.name + ".zip")):
        if path.is_file() and (zipfile.is_zipfile(path) or begins_as_zip(path)):
            return open_zip(path)
    raise FileNotFoundError(
        f"no images: {images_path} is neither a folder nor a zip file; name it by {flag}"
    )


def begins_as_zip(path: Path) -> bool:
    """Whether a file, perhaps cut off at its end, begins as zip files do."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"
