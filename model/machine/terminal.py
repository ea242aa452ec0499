"""Owns what a program in a terminal must bear: text that would be obeyed instead of shown, a reader
that has left, a wish to stop."""

import contextlib
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator

# What a terminal would obey instead of show; a model can say any byte.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")
# Unicode categories: controls, halves of characters (bytes of a name that are not UTF-8), ends of
# lines and of paragraphs.
ESCAPED = ("Cc", "Cs", "Zl", "Zp")


def shown(text: str) -> str:
    """A text of lines, without what would move the cursor or change colours."""
    return text.translate(CONTROLS)


def one_line(text: str) -> str:
    """A name or an error as one line; what has no place there is escaped as Python does."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ESCAPED else c
        for c in text
    )


@contextlib.contextmanager
def printing(*, is_extra: bool) -> Iterator[None]:
    """Around what is printed, for a reader that may have left (`| head`).

    Args:
        is_extra: the results go elsewhere too, so that the work goes on without a reader.
    Raises:
        BrokenPipeError: it has left, and there was nobody else to work for.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        if not is_extra:
            raise


def silence_stdout() -> None:
    """Print to nobody from here on; what waits to be printed would fail once more at the end."""
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, sys.stdout.fileno())
    os.close(nobody)


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken as Ctrl-C is: what is done so far can be written."""


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Raises `Terminated` in the main thread where a scheduler wishes the program to stop."""

    def stop(_signum: int, _frame) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
