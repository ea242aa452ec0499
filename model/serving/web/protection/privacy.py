"""Owns removing the server's paths from error messages that a visitor sees."""

import re
from pathlib import Path

from model.machine.paths import ROOT

QUOTED = re.compile(r"""(['"])(?:/|[A-Za-z]:[/\\])[^'"]*[/\\]([^'"/\\]*)\1""")
BARE = re.compile(r"(?<![\w.<>/\\:])(?:/|[A-Za-z]:[/\\])(?:[^\s/\\:,;'\"<>]+[/\\])+")


def without_paths(error: Exception | str) -> str:
    """An error's message with each absolute path cut to its last part."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = str(error)
    for folder in (ROOT, Path.home()):  # may hold spaces, which the patterns do not match
        words = words.replace(f"{folder}/", "").replace(f"{folder}\\", "")
    return BARE.sub("", QUOTED.sub(r"\1\2\1", words))
