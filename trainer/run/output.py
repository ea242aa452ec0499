"""Owns what becomes of lines that cannot be written: they are lost, the run is not."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from trainer.ranks.signals import CLOSED_OUTPUT, StopSignal


class Output:
    """A text stream that drops what cannot be written.

    Args:
        on_failure: hears of every such error, and may raise another in its place.
    """

    def __init__(self, stream: TextIO, on_failure: Callable[[OSError], None]):
        self._stream, self._on_failure = stream, on_failure

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._on_failure(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._on_failure(error)


@contextlib.contextmanager
def surviving_output(stop: StopSignal) -> Iterator[None]:
    """What is printed within the block ends no training.

    A full disk costs lines, which is said once. A reader that has gone (`| head`) asks training to
    save and leave, and ends a program that is not training yet by a `BrokenPipeError`.
    """
    stdout, stderr = sys.stdout, sys.stderr
    failures: list[OSError] = []

    def lost(error: OSError) -> None:
        failures.append(error)
        if isinstance(error, BrokenPipeError) and not stop.is_on:
            raise error
        if isinstance(error, BrokenPipeError):
            stop.ask(CLOSED_OUTPUT)
        if len(failures) == 1:
            what = "nobody reads the output any more: will save and leave"
            if not isinstance(error, BrokenPipeError):
                what = f"lines are lost, the output cannot be written ({error}); training goes on"
            print(f"warning: {what}", file=sys.stderr, flush=True)

    sys.stdout, sys.stderr = Output(stdout, lost), Output(stderr, lambda error: None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for stream in (stdout, stderr):
            drop_unwritten(stream)


def drop_unwritten(stream: TextIO) -> None:
    """Python writes at its end what a stream still holds, and fails the program if it cannot."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
