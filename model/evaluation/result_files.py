"""Owns the files that an evaluation leaves: where they may stand, and text that all can read."""

import json
import re
from pathlib import Path

from model.machine.atomic_file import atomic_write, check_place, real_place

HALF = re.compile("[\ud800-\udfff]")  # of a character: a byte of a name that is not UTF-8


def check_result_files(results: dict[str, Path | None], inputs: dict[str, Path | None]) -> None:
    """See to it that results can be written before hours go into them.

    Args:
        results, inputs: flag -> file; None where it is not given.
    Raises:
        ValueError: a place that cannot be written, or that holds what is read or written too.
    """
    taken = {real_place(path): flag for flag, path in inputs.items() if path}
    for flag, path in results.items():
        if path:
            check_place(path, flag=flag)
            if other := taken.get(real_place(path)):
                raise ValueError(f"{flag} {path} would replace the file of {other}; name another")
            taken[real_place(path)] = flag


def write_json(path: Path, content: dict) -> None:
    """Write JSON in UTF-8. Halves of characters, which strict readers refuse even where they are
    escaped, become the plain text that Python shows for them, such as `\\udcff`."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = HALF.sub(lambda half: rf"\\u{ord(half[0]):04x}", text)
    atomic_write(path, lambda file: file.write(text.encode()))


def write_html(path: Path, page: str) -> None:
    """Write a page in UTF-8, halves of characters as above."""
    atomic_write(path, lambda file: file.write(page.encode("utf-8", "backslashreplace")))
