"""Owns printing that cannot end a run: lines that cannot be written are dropped."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from trainer.ranks.signals import CLOSED_OUTPUT, StopSignal


class Output:
    """A text stream that drops what cannot be written.

    Args:
        on_failure: called with every such error; may raise.
    """

    def __init__(self, stream: TextIO, on_failure: Callable[[OSError], None]):
        self._stream, self._on_failure = stream, on_failure

    def __getattr__(self, name: str) -> Any:
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
    """A context in which printing never ends training.

    On a full disk lines are lost, with one warning. If the reader has gone (`| head`), training
    saves and stops; before training the program ends by a `BrokenPipeError`.
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
    """Discard what a stream cannot write: Python would try again at exit, and fail the program."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
