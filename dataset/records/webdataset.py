"""Owns records of a WebDataset tar, read in place: files of one name are one sample.

A sample is its pictures, in their order, and a `.json` with the conversation. Nothing is unpacked.
Source: https://github.com/webdataset/webdataset#the-webdataset-format
"""

import os
import tarfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from dataset.records.base import Records
from dataset.records.conversation import BadRecordError, decode, parse_json
from dataset.records.data_file import NO_RECORDS
from dataset.records.images import check_size, open_images
from dataset.records.index_file import Index, is_mapped, kept_index

JSON, PICTURE, OTHER = range(3)  # kinds of members
LONGEST_END = 1 << 16  # of zeros, that are looked at
WIDTH = 4  # of an index: a member's sample, offset, size and kind
PICTURE_SUFFIXES = {"jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"}
NO_FILE = "._"  # begins what macOS adds beside a file


class TarRecords(Records):
    """Records of a tar of samples. Pictures in the tar go before those that the `.json` names.

    Raises:
        ValueError: it is not a readable tar, or holds no sample.
    """

    image_fields = ("image_bytes", "image", "images")

    def __init__(self, data_path: Path, images_path: Path | None, *, fix_image_count: bool = False):
        images = open_images(images_path) if images_path and images_path.exists() else None
        super().__init__(data_path, images, fix_image_count=fix_image_count)
        self._fd: BufferedReader | None = None
        self._fd_owner: int | None = None  # process id: each process opens the file for itself
        self._members = self._find_index()
        if not len(self._members):
            raise ValueError(f"{data_path}: {NO_RECORDS}")

    def _find_index(self) -> Index:
        return kept_index(self.data_path, self._make_index, kind="tar", width=WIDTH)

    def _make_index(self) -> Index:
        return np.array(list(tar_members(self.data_path)), dtype=np.int64).reshape(-1, WIDTH)

    def __getstate__(self) -> dict[str, Any]:
        members = None if is_mapped(self._members) else self._members
        return self.__dict__ | {"_fd": None, "_fd_owner": None, "_members": members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if state["_members"] is None:  # it is mapped again, not sent
            self._members = self._find_index()

    def __len__(self) -> int:
        return int(self._members[-1, 0]) + 1

    def where(self, index: int) -> str:
        """ "file:sample" with the number of a sample, counted from 0."""
        return f"{self.data_path.name}:sample {index}"

    def _raw(self, index: int, *, where: str) -> Mapping[str, Any]:
        first, last = np.searchsorted(self._members[:, 0], [index, index + 1])
        members = self._members[first:last]
        texts = [self._read(m, where=where) for m in members if m[3] == JSON]
        if len(texts) != 1:
            raise BadRecordError(
                f"{where}: {len(texts)} .json files in it; one with the conversation is wanted"
            )
        raw = parse_json(decode(texts[0], where=where), where=where)
        raw = {"conversations": raw} if isinstance(raw, list) else raw
        if not isinstance(raw, dict):
            raise BadRecordError(f"{where}: its .json must hold an object or a list of messages")
        pictures = [self._read(m, where=where) for m in members if m[3] == PICTURE]
        return raw | {"image_bytes": pictures} if pictures else raw

    def _read(self, member: Index, *, where: str) -> bytes:
        _, offset, size, _ = map(int, member)
        try:
            check_size(size, name=where)
        except ValueError as error:
            raise BadRecordError(f"{where}: {error}") from None
        if self._fd is None or self._fd_owner != os.getpid():
            self._fd, self._fd_owner = open(self.data_path, "rb"), os.getpid()
        self._fd.seek(offset)
        return self._fd.read(size)


def tar_members(path: Path) -> Iterator[tuple[int, int, int, int]]:
    """Sample, offset, size and kind of each regular file; neighbours of one name are a sample.

    Raises:
        ValueError: it is no tar, or is cut off.
    """
    size, sample, last_key = path.stat().st_size, -1, None
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # else it keeps them all
                folder, _, name = member.name.rpartition("/")
                if not member.isreg() or name.startswith(NO_FILE):
                    continue
                if member.offset_data + member.size > size:
                    raise ValueError(f"{path} is cut off; fetch it again")
                stem, _, suffixes = name.partition(".")
                if (folder, stem) != last_key:
                    sample, last_key = sample + 1, (folder, stem)
                yield sample, member.offset_data, member.size, kind_of(suffixes)
            check_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable tar file ({error}); unpack what is in it") from (
            None
        )


def check_end(path: Path, start: int) -> None:
    """Raise ValueError unless a tar has its end, blocks of zeros, where its last member ends:
    tarfile takes a damaged header, and a file that is cut off between two members, for the end."""
    with open(path, "rb") as file:
        file.seek(start)
        end = file.read(LONGEST_END)
    if len(end) < tarfile.BLOCKSIZE:
        raise ValueError(f"{path} is cut off; fetch it again")
    if end.strip(b"\0"):
        raise ValueError(
            f"{path}: what stands behind byte {start} cannot be read: it is damaged, or two tars "
            "were joined by `cat`, which `tar --concatenate` does rightly"
        )


def kind_of(suffixes: str) -> int:
    """The kind of a member by what stands behind the first dot of its name."""
    last = suffixes.rpartition(".")[2].lower()
    return PICTURE if last in PICTURE_SUFFIXES else JSON if last == "json" else OTHER
