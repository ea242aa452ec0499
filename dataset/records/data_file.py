"""Owns what a data file must be before it is read: a regular file and, where it holds text, UTF-8.

Other kinds of file are recognised by their first bytes and refused with one message, where
reading on would report every line as bad.
"""

import codecs
from collections.abc import Sequence
from pathlib import Path

HEAD_BYTES = 1 << 16
BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
BINARY = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "compressed; unpack it by `gunzip`",
    b"\x28\xb5\x2f\xfd": "compressed; unpack it by `unzstd`",
    b"\xfd7zXZ\0": "compressed; unpack it by `unxz`",
    b"BZh": "compressed; unpack it by `bunzip2`",
    b"PAR1": "a Parquet file; name it .parquet (a stage with images reads it)",
    b"%PDF-": "a PDF; extract its text",
    b"version https://git-lfs": "a git-lfs pointer; run `git lfs pull`",
}
NO_RECORDS = "no records in it"  # how every reader's error for an empty file ends
NAMES_SHOWN = 8  # of files
FEW_NULS = 0.01  # share of NUL bytes in all bytes read; a file with more is binary
MANY_NULS = 0.1  # share in the bytes at one place modulo 4; more of them show a wide encoding


def check_file(path: Path, *, what: str, flag: str) -> None:
    """Refuse a missing file, and one that is not regular: reading a FIFO could block for ever.

    Args:
        what: name of the file's kind in the message, such as "data file".
        flag: the flag that gives the path.
    Raises:
        FileNotFoundError: nothing there.
        ValueError: a folder, FIFO or device.
    """
    if path.is_file():
        return
    if path.exists():
        raise ValueError(f"{path} is a folder, FIFO or device; name a regular file by {flag}")
    raise FileNotFoundError(f"no {what} {path}; name it by {flag}")


def is_empty(error: Exception) -> bool:
    """Whether a reader says that a file is sound and holds no record."""
    return isinstance(error, ValueError) and str(error).endswith(NO_RECORDS)


def emptiness_of(paths: Sequence[Path]) -> str | None:
    """A line about files that are passed over, since no record is in them; None for none."""
    if not paths:
        return None
    names = ", ".join(path.name for path in paths[:NAMES_SHOWN])
    more = ", ..." if len(paths) > NAMES_SHOWN else ""
    return f"{len(paths)} file(s) without a record are passed over: {names}{more}"


def check_text(path: Path) -> None:
    """Raise ValueError where a file's first bytes say that it is not text in UTF-8."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    for begins, what in BINARY.items():
        if head.startswith(begins):
            raise ValueError(f"{path} is {what}")
    encoding = _wide_encoding(head)
    if encoding == "binary":
        raise ValueError(f"{path} is a binary file, not text")
    if encoding:
        raise ValueError(
            f"{path} is text in {encoding}, not UTF-8; convert it: "
            f"`iconv -f {encoding} -t UTF-8 {path.name} > utf8_{path.name}`"
        )


def _wide_encoding(head: bytes) -> str | None:
    """Name of an encoding with two or four bytes a character, recognised by its byte order mark
    or by the places of its NUL bytes; "binary" if NULs are at all places; else None (UTF-8, in
    which a few bytes may be NUL)."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    if b"\0" not in head:
        return None
    places = [head[place::4] for place in range(4)]
    nuls = [at.count(0) / len(at) if at else 0.0 for at in places]
    for encoding, wide, narrow in (
        ("UTF-32LE", (2, 3), (0,)),
        ("UTF-32BE", (0, 1), (3,)),
        ("UTF-16LE", (1, 3), (0, 2)),
        ("UTF-16BE", (0, 2), (1, 3)),
    ):
        least, most = min(nuls[i] for i in wide), max(nuls[i] for i in narrow)
        if least > MANY_NULS and most < least / 3:  # a few characters end in NUL: U+4E00
            return encoding
    return "binary" if head.count(0) > FEW_NULS * len(head) else None
