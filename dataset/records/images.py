"""Owns reading a data set's encoded pictures from a folder, or from a zip file in place."""

import os
import zipfile
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any


class ImageFolder:
    """Images as files below a folder."""

    def __init__(self, root: Path):
        self.root = root

    @cached_property
    def _names(self) -> frozenset[str]:
        """Regular files, and links, whose targets are checked when they are read."""
        return frozenset(
            entry.name
            for entry in os.scandir(self.root)
            if entry.is_file(follow_symlinks=False) or entry.is_symlink()
        )

    def exists(self, name: str) -> bool:
        try:
            return name in self._names or (self.root / name).is_file()
        except OSError:  # no file system takes such a name
            return False

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            ValueError: a FIFO or device of that name: reading it could block for ever.
            OSError: it cannot be read.
        """
        path = self.root / name
        if not path.is_file() and path.exists():
            raise ValueError(f"{name} in {self.root} is a folder, FIFO or device, not a file")
        return path.read_bytes()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}


class ImageZip:
    """Images as members of a zip file, read in place; each process opens it for itself."""

    def __init__(self, root: Path):
        self.root = root
        self._opened_by: int | None = None  # process id
        self._zip: zipfile.ZipFile | None = None

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None or self._opened_by != os.getpid():
            try:
                self._zip, self._opened_by = zipfile.ZipFile(self.root), os.getpid()
            except (zipfile.BadZipFile, NotImplementedError) as error:
                raise ValueError(f"{self.root}: not a readable zip file ({error})") from error
        return self._zip

    @cached_property
    def _members(self) -> dict[str, str]:
        """File name, with or without its folder inside the zip -> member. A name that occurs in
        several folders is found only with its folder."""
        members = [m for m in self._open().namelist() if not m.endswith("/")]
        times = Counter(m.rsplit("/", 1)[-1] for m in members)
        by_name = {m.rsplit("/", 1)[-1]: m for m in members}
        unique = {name: member for name, member in by_name.items() if times[name] == 1}
        return unique | {m: m for m in members}

    def exists(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        """The bytes of a member; raises `ValueError` where it is damaged or encrypted."""
        archive, member = self._open(), self._members[name]
        try:
            return archive.read(member)
        except Exception as error:  # zlib, lzma, bz2 and struct each have errors of their own
            why = str(error) or type(error).__name__
            raise ValueError(f"{name} in {self.root.name} cannot be read ({why})") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_opened_by": None, "_zip": None}


def open_images(images_path: Path | None) -> ImageFolder | ImageZip | None:
    """The images of a folder or zip; for a missing folder, its name with `.zip` is tried."""
    if images_path is None:
        return None
    if images_path.is_dir():
        return ImageFolder(images_path)
    for path in (images_path, images_path.with_name(images_path.name + ".zip")):
        if path.is_file() and zipfile.is_zipfile(path):
            return ImageZip(path)
    raise FileNotFoundError(
        f"no images: {images_path} is neither a folder nor a zip file; name it by --images_path"
    )
