"""Owns what every program in a terminal must handle: control characters, a closed pipe, SIGTERM."""

import contextlib
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from types import FrameType

# Control characters but tab and newline: a terminal obeys them, and a model may emit any.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")
# Unicode categories: controls, surrogates (how Python holds bytes of a file name that are not
# UTF-8), line and paragraph separators.
ESCAPED = ("Cc", "Cs", "Zl", "Zp")


def shown(text: str) -> str:
    """A text of several lines, without what would move the cursor or change colours."""
    return text.translate(CONTROLS)


def one_line(text: str) -> str:
    """A name or an error as one line, its control characters escaped as Python does."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ESCAPED else c
        for c in text
    )


@contextlib.contextmanager
def printing(*, is_extra: bool) -> Iterator[None]:
    """Print inside this block, where the reader may close the pipe (`| head`).

    Args:
        is_extra: the results are written elsewhere too, so a closed pipe is no error.
    Raises:
        BrokenPipeError: the pipe is closed and `is_extra` is False.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        if not is_extra:
            raise


def silence_stdout() -> None:
    """Redirect stdout to the null device, else flushing its buffer at exit would fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that what is done so far can be written."""


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Raise `Terminated` in the main thread on SIGTERM, by which a scheduler stops a job."""

    def stop(_signum: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
