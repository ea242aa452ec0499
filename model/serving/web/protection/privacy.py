"""Owns what of an error a visitor may read: never where on the server a file lies."""

import re
from pathlib import Path

from model.machine.paths import ROOT

QUOTED = re.compile(r"""(['"])(?:/|[A-Za-z]:[/\\])[^'"]*[/\\]([^'"/\\]*)\1""")
BARE = re.compile(r"(?<![\w.<>/\\:])(?:/|[A-Za-z]:[/\\])(?:[^\s/\\:,;'\"<>]+[/\\])+")


def without_paths(error: Exception | str) -> str:
    """An error's words, of each absolute path only the last part."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = str(error)
    for folder in (ROOT, Path.home()):  # their names may hold spaces, at which no path is found
        words = words.replace(f"{folder}/", "").replace(f"{folder}\\", "")
    return BARE.sub("", QUOTED.sub(r"\1\2\1", words))
