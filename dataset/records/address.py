"""Owns addresses of shards that are not on this machine, such as `hf://datasets/USER/NAME/*.parquet`
or `https://host/shard-{000..010}.tar`, and how streams of them are read."""

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://")
AS_A_PATH = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")  # what `Path` makes of an address
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
MOST_SHARDS = 1_000_000


@dataclass(frozen=True)
class Address:
    """One shard, or several by `*` and `{000..010}`."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def scheme(self) -> str:
        """Such as "https"."""
        return self.url.partition("://")[0]

    @property
    def path(self) -> PurePosixPath:
        """Without scheme and query, for names in messages."""
        text = self.url.partition("://")[2]
        return PurePosixPath(text.partition("?")[0] if self.scheme.startswith("http") else text)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    def urls(self) -> list[str]:
        """The addresses with their braces written out; `*` stays.

        Raises:
            ValueError: braces that are neither `{a,b}` nor `{000..010}`.
        """
        pieces = BRACES.split(self.url)
        choices = [
            [piece] if number % 2 == 0 else self._choices(piece)
            for number, piece in enumerate(pieces)
        ]
        return ["".join(parts) for parts in itertools.product(*choices)]

    def _choices(self, text: str) -> list[str]:
        match = NUMBERS.fullmatch(text)
        if match is None and "," in text:
            return text.split(",")
        if match is None or not 0 <= int(match[2]) - int(match[1]) < MOST_SHARDS:
            raise ValueError(
                f"{self.url}: {{{text}}} is neither {{000..010}} with a rising number nor {{a,b}}"
            )
        width = len(match[1]) if match[1].startswith("0") else 0
        return [str(number).zfill(width) for number in range(int(match[1]), int(match[2]) + 1)]


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is read.

    seed: of the run. cache: the folder of fetched shards. cache_gb: its largest size in GiB.
    window: how many units (shards, or parts of large Parquet files) are shuffled together.
    num_streams: that share the folder, in a mixture.
    """

    seed: int = 0
    cache: Path | None = None
    cache_gb: float = 16.0
    window: int = 8
    num_streams: int = 1

    @property
    def folder(self) -> Path:
        """The folder of fetched shards; by default in the user's cache folder."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return self.cache or Path(home) / "minimind-v" / "streams"


def is_address(text: str) -> bool:
    """Whether a text names something on another machine."""
    return SCHEME.match(text) is not None


def check_no_address(path: Path) -> None:
    """Raise ValueError for a path that was an address, where only files are read."""
    if AS_A_PATH.match(str(path)) and not path.exists():
        raise ValueError(
            f"{path.as_posix().replace(':/', '://', 1)}: only --data_path of the training stages "
            "with images reads from other machines; download it first"
        )
