"""Owns finding the members of a zip file by name, in a memory that does not grow with their number.

The file's own directory is not kept: an index has two hashes a member, of its name with and without
its folder, and where the directory tells of it. A look-up is a search in the index and a read. The
index is kept and mapped as `index_file` does, so the processes of a machine share it.

Names are compared as bytes, in UTF-8, GBK and cp437: many programs write the machine's own encoding
and do not say which. A name may have backslashes in place of slashes.

Source: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import contextlib
import hashlib
import os
import struct
import zipfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np

from dataset.records.index_file import Index, kept_index

END = struct.Struct("<4s4H2LH")  # at the end of the file: where the directory is
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")  # right before `END`: where `END_64` is
ENTRY = struct.Struct("<4s6H3L5H2L")  # of the directory, with name, extra field and comment behind
LOCAL = struct.Struct("<4s5H3L2H")  # before a member's data, with name and extra field behind
LONGEST_COMMENT = 1 << 16
HEAD_BYTES = 512  # read of an entry at first
FULL_16, FULL_32 = 0xFFFF, 0xFFFFFFFF  # say that the real number stands elsewhere
NOT_READ, IS_UTF8 = 0x61, 0x800  # bits of an entry's flags: two kinds of encryption, a patch
ENCODINGS = ("utf-8", "gbk", "cp437")
WIDTH = 2  # of the index: a name's hash, where its entry is in the file


class ZipMembers:
    """The members of a zip file by name; each process opens the file for itself.

    Raises:
        ValueError: it is no zip file, or its directory is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: BufferedReader | None = None
        self._owner: int | None = None  # process id
        try:
            self._shift, *self._directory = self._find_directory()
            index = kept_index(path, self._make_index, kind="zip", width=WIDTH)
        except (struct.error, ValueError) as error:
            raise ValueError(
                f"{path}: not a readable zip file ({error}); fetch or write it again"
            ) from error
        self._hashes, self._places = index[:, 0], index[:, 1]

    def _read(self, start: int, size: int) -> bytes:
        file = self._opened()
        file.seek(start)
        return file.read(size)

    def _opened(self) -> BufferedReader:
        if self._file is None or self._owner != os.getpid():
            self._file, self._owner = open(self.path, "rb"), os.getpid()
        return self._file

    def _find_directory(self) -> tuple[int, int, int]:
        """What is to be added to places in the file, since something may stand before the zip;
        where its directory begins, and how long it is."""
        size = self.path.stat().st_size
        first = max(0, size - LONGEST_COMMENT - END.size)
        tail = self._read(first, size - first)
        place = tail.rfind(b"PK\5\6")
        if place < 0 or place + END.size > len(tail):
            raise ValueError("it is cut off: its directory, at the end, is missing")
        *_, length, start, _ = END.unpack_from(tail, place)
        end = first + place
        locator = self._read(max(0, end - LOCATOR_64.size), LOCATOR_64.size)
        if locator.startswith(b"PK\6\7"):
            end -= LOCATOR_64.size + END_64.size
            mark, *_, length, start = END_64.unpack(self._read(end, END_64.size))
            if mark != b"PK\6\6":
                raise ValueError("its 64-bit directory is not where it should be")
        shift = end - length - start
        if shift < 0:
            raise ValueError("it is cut off: its directory begins before the file does")
        return shift, start + shift, length

    def _make_index(self) -> Index:
        """Hashes of all names with the places of their entries, sorted by hash; the bare name of a
        file only where no other has it."""
        whole, bare, places = [], [], []
        for place, flags, name in self._names():
            whole.append(hash_of(name))
            bare.append(hash_of(bare_name(name, is_utf8=bool(flags & IS_UTF8))))
            places.append(place)
        hashes, at = np.array(bare, np.int64), np.array(places, np.int64)
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        alone = first[counts == 1]
        both = np.concatenate([hashes[alone], np.array(whole, np.int64)])
        at = np.concatenate([at[alone], at])
        order = np.argsort(both, kind="stable")  # of equal names the last counts
        return np.stack([both[order], at[order]], axis=1)

    def _names(self) -> Iterator[tuple[int, int, bytes]]:
        """Place, flags and name of each entry that is a file."""
        start, length = self._directory
        content, at = self._read(start, length), 0
        while at < length:
            mark, *_ = fields = ENTRY.unpack_from(content, at)
            if mark != b"PK\1\2":
                raise ValueError(f"bad entry in its directory, at byte {start + at}")
            name_size = fields[10]
            name = content[at + ENTRY.size : at + ENTRY.size + name_size]
            if not name.endswith((b"/", b"\\")) or fields[9]:
                yield start + at, fields[3], name
            at += ENTRY.size + sum(fields[10:13])

    def find(self, name: str) -> zipfile.ZipInfo | None:
        """The member of a name, with its folder or, where no other has it, without."""
        for wanted, encoding in codes_of(name):
            found = self._find_bytes(wanted, is_utf8=encoding == "utf-8")
            if found is not None:
                return found
        return None

    def _find_bytes(self, wanted: bytes, *, is_utf8: bool) -> zipfile.ZipInfo | None:
        wanted_hash = hash_of(wanted)
        first = last = int(np.searchsorted(self._hashes, wanted_hash))
        while last < len(self._hashes) and self._hashes[last] == wanted_hash:
            last += 1
        for place in self._places[first:last].tolist()[::-1]:
            info, raw = self._entry(place)
            if info.flag_bits & IS_UTF8 and not is_utf8:
                continue
            if wanted in (raw, bare_name(raw, is_utf8=bool(info.flag_bits & IS_UTF8))):
                return info
        return None

    def _entry(self, place: int) -> tuple[zipfile.ZipInfo, bytes]:
        """What the directory says of a member, and its name as it stands there."""
        head = self._read(place, HEAD_BYTES)
        fields = ENTRY.unpack_from(head)
        if ENTRY.size + fields[10] + fields[11] > len(head):
            head = self._read(place, ENTRY.size + fields[10] + fields[11])
        name = head[ENTRY.size : ENTRY.size + fields[10]]
        extra = head[ENTRY.size + fields[10] : ENTRY.size + fields[10] + fields[11]]
        info = zipfile.ZipInfo("member")
        info.orig_filename = name.decode("latin-1")  # its bytes, whatever their encoding
        info.flag_bits, info.compress_type, info.CRC = fields[3], fields[4], fields[7]
        sizes = wide_numbers((fields[9], fields[8], fields[16]), extra)
        info.file_size, info.compress_size, info.header_offset = sizes
        return info, name

    def read(self, info: zipfile.ZipInfo) -> bytes:
        """The unpacked bytes of a member: no more than `info.file_size`.

        Raises:
            Exception: what the library of its compression raises on damaged data.
        """
        if info.flag_bits & NOT_READ:
            raise ValueError("it is encrypted, or a patch")
        start = info.header_offset + self._shift
        local = LOCAL.unpack(self._read(start, LOCAL.size))
        if local[0] != b"PK\3\4":
            raise ValueError("no member begins where the directory says")
        if self._read(start + LOCAL.size, local[9]) != info.orig_filename.encode("latin-1"):
            raise ValueError("the member has another name than the directory says")
        file = self._opened()
        file.seek(start + LOCAL.size + local[9] + local[10])
        content = zipfile.ZipExtFile(file, "r", info).read()
        if len(content) != info.file_size:
            raise ValueError(f"{len(content)} of {info.file_size} bytes are there")
        return content

    def __reduce__(self) -> tuple[type["ZipMembers"], tuple[Path]]:
        return ZipMembers, (self.path,)


def hash_of(name: bytes) -> int:
    """64 bits, with a sign."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), signed=True)


def codes_of(name: str) -> Iterator[tuple[bytes, str]]:
    """The bytes that may stand for a name, with their encoding; once where all have the same."""
    for spelling in [name, name.replace("/", "\\")] if "/" in name else [name]:
        for encoding in ENCODINGS[:1] if name.isascii() else ENCODINGS:
            with contextlib.suppress(UnicodeEncodeError):
                yield spelling.encode(encoding), encoding


def bare_name(name: bytes, *, is_utf8: bool) -> bytes:
    """A name without its folder. In GBK a backslash may be half of a character."""
    if b"\\" not in name:
        return name.rpartition(b"/")[2]
    for encoding in ENCODINGS[:1] if is_utf8 or name.isascii() else ENCODINGS:
        try:
            text = name.decode(encoding)
        except UnicodeDecodeError:
            continue
        return text.replace("\\", "/").rpartition("/")[2].encode(encoding)
    return name


def wide_numbers(numbers: tuple[int, int, int], extra: bytes) -> tuple[int, int, int]:
    """Sizes and place of a member, those that are full taken from its extra field.

    Raises:
        ValueError: they are not in it.
    """
    if FULL_32 not in numbers:
        return numbers
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, 4))
            try:
                first, second, third = (next(wide) if n == FULL_32 else n for n in numbers)
            except (ValueError, RuntimeError):  # fewer than are wanted
                break
            return first, second, third
        extra = extra[4 + size :]
    raise ValueError("the sizes of a large member are missing")
