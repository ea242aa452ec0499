"""Owns the files that an evaluation writes: which places are allowed, and valid UTF-8 in them."""

import json
import re
from pathlib import Path
from typing import Any

from model.machine.atomic_file import atomic_write, check_place, real_place

SURROGATE = re.compile("[\ud800-\udfff]")  # a byte of a file name that is not UTF-8


def check_result_files(results: dict[str, Path | None], inputs: dict[str, Path | None]) -> None:
    """Check that results can be written, before hours of work.

    Args:
        results, inputs: flag -> file; None where it is not given.
    Raises:
        ValueError: a place that cannot be written, or that is also an input or another result.
    """
    taken = {real_place(path): flag for flag, path in inputs.items() if path}
    for flag, path in results.items():
        if path:
            check_place(path, flag=flag)
            if other := taken.get(real_place(path)):
                raise ValueError(f"{flag} {path} would replace the file of {other}; name another")
            taken[real_place(path)] = flag


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in UTF-8.

    Lone surrogates, which strict readers refuse even where they are escaped, become the plain text
    that Python shows for them, such as `\\udcff`.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = SURROGATE.sub(lambda match: rf"\\u{ord(match[0]):04x}", text)
    atomic_write(path, lambda file: file.write(text.encode()))


def write_html(path: Path, page: str) -> None:
    """Write a page in UTF-8, with lone surrogates as in `write_json`."""
    atomic_write(path, lambda file: file.write(page.encode("utf-8", "backslashreplace")))
