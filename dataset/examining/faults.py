"""Owns the kinds of faults that a record can have, and the book in which they are counted.

The readers say in words what is wrong; the kind is told by those words.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SHOWN = 10  # faults of a kind that are kept in memory, to be shown
LONGEST_MESSAGE = 500
OTHER = "another fault"
UNREADABLE_FILE = "file that cannot be read"
LEAVES_FOLDER = "image name that leaves its folder"
LEAKED_PICTURE = "picture of the held-out set"
LEAKED_RECORD = "record of the held-out set"
# Kind -> what its messages hold. The first that fits counts.
KINDS = {
    "not UTF-8": r"not UTF-8",
    "not JSON": r"not valid JSON|must be a JSON object|ends before its end",
    LEAVES_FOLDER: r"leaves the folder|leads out of|climbs|outside (?:of )?(?:the |its )?"
    r"(?:images|folder)",
    "picture too large": r"over [\d,]+ (?:pixels|bytes)|over what Pillow decodes|is too thin"
    r"|MiB, and a picture's file may",
    "record too large": r"MiB, and a record may",
    "broken picture": r"not a readable image",
    "image that is not there": r"is not in .* as a file|no --images_path|no such image",
    "image that cannot be read": r"cannot be read|FIFO or device|[Nn]o such file|Permission denied"
    r"|Is a directory|File name too long|embedded null",
    "tags and images differ in number": r"tag\(s\) but \d+ image",
    "image tag outside a question": r"an image belongs into a question",
    "pictures where they are not read": r"which is not read|which is read as words",
    "images of a wrong type": r"'image' must be|'image_bytes' must be|'images' must be",
    "no answer": r"no assistant message|no answer|no caption|no text beside",
    "wrong role": r"has role|it must be first",
    "no text in a message": r"has no text|is not an object|'conversations' must be",
    "tools that are not JSON objects": r"functions",
    "special token in a text": r"special token|image placeholder|half a character",
    "cut before its answer": r"no supervised token",
}


@dataclass(frozen=True)
class Fault:
    """What is wrong (`message`, one of `KINDS` or of the caller's), and its file and line."""

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def kind_of(message: str) -> str:
    """The kind of fault that a reader's message tells."""
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "''", message)  # names may hold any words
    for text in (unquoted, message):
        for kind, words in KINDS.items():
            if re.search(words, text):
                return kind
    return OTHER


def fault_of(error: BaseException, *, where: str, named: str = "") -> Fault:
    """An error of a reader as a fault.

    Args:
        where: file and line, as the user knows the file.
        named: what the message begins with instead of `where`, to be left out.
    """
    message = str(error) or type(error).__name__
    for prefix in (named, where):
        message = message.removeprefix(f"{prefix}: ") if prefix else message
    message = " ".join(message.split())
    if len(message) > LONGEST_MESSAGE:
        message = message[:LONGEST_MESSAGE] + "..."
    return Fault(kind_of(message), where, message)


class FaultBook:
    """Counts faults by kind. All are written to a temporary file, so that memory stays flat; the
    first `SHOWN` of each kind are at hand in `examples`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Fault]] = {}
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace")

    def add(self, fault: Fault) -> None:
        self.counts[fault.kind] += 1
        shown = self.examples.setdefault(fault.kind, [])
        if len(shown) < SHOWN:
            shown.append(fault)
        self._file.write(json.dumps(vars(fault), ensure_ascii=False) + "\n")

    def __len__(self) -> int:
        return self.counts.total()

    def by_count(self) -> list[str]:
        """The kinds, the most frequent first."""
        return [kind for kind, _ in self.counts.most_common()]

    def __iter__(self) -> Iterator[Fault]:
        """All faults, in the order in which they were added."""
        self._file.flush()
        self._file.seek(0)
        for line in self._file:
            fields: dict[str, Any] = json.loads(line)
            yield Fault(**fields)
        self._file.seek(0, 2)
