"""Owns writing a zip of pictures, in a memory that does not grow with their number.

Members are not compressed, as pictures are already. The directory, which stands at the end, waits
in a temporary file; `zipfile` keeps over a kilobyte a member for it. The bytes depend on the
members alone.

Source: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import shutil
import struct
import tempfile
import zlib
from contextlib import AbstractContextManager
from typing import IO

from dataset.records.zip_members import (
    END,
    END_64,
    ENTRY,
    FULL_16,
    FULL_32,
    IS_UTF8,
    LOCAL,
    LOCATOR_64,
)

NEEDED, NEEDED_64 = 20, 45  # version of a reader, times ten
STORED = 0
DAY = 1 << 5 | 1  # of every member: 1980-01-01


class ZipWriter(AbstractContextManager["ZipWriter"]):
    """Writes members one after another; the zip is whole when the block ends well.

    Args:
        file: it is written to from where it stands, which is taken for its beginning.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._directory = file, tempfile.TemporaryFile()
        self._place = self._num = 0

    def add(self, name: str, content: bytes) -> None:
        """Write a member; each name once, of content below 4 GiB."""
        raw = name.encode()
        flags = 0 if raw.isascii() else IS_UTF8
        about = zlib.crc32(content), len(content), len(content), len(raw)
        is_far = self._place >= FULL_32
        extra = struct.pack("<2HQ", 1, 8, self._place) if is_far else b""
        needed = NEEDED_64 if is_far else NEEDED
        entry = ENTRY.pack(
            b"PK\1\2", needed, needed, flags, STORED, 0, DAY, *about, len(extra), 0, 0, 0, 0,
            min(self._place, FULL_32),
        )  # fmt: skip
        self._directory.write(entry + raw + extra)
        local = LOCAL.pack(b"PK\3\4", NEEDED, flags, STORED, 0, DAY, *about, 0)
        self._write(local + raw)
        self._write(content)
        self._num += 1

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._place += len(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._directory.close()

    def _finish(self) -> None:
        start, length = self._place, self._directory.tell()
        self._directory.seek(0)
        shutil.copyfileobj(self._directory, self._file)
        if self._num >= FULL_16 or start + length >= FULL_32:
            self._file.write(
                END_64.pack(b"PK\6\6", END_64.size - 12, NEEDED_64, NEEDED_64, 0, 0, self._num,
                            self._num, length, start)
            )  # fmt: skip
            self._file.write(LOCATOR_64.pack(b"PK\6\7", 0, start + length, 1))
        num = min(self._num, FULL_16)
        self._file.write(
            END.pack(b"PK\5\6", 0, 0, num, num, min(length, FULL_32), min(start, FULL_32), 0)
        )
