"""Owns signals: which of them ask training to save and stop, and how the ranks agree on one."""

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from trainer.ranks.group import is_main_process

# What schedulers, terminals and users send; not all of them exist everywhere. SIGTERM is last, so
# it counts where ranks were sent several.
NAMES = ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTERM")
Result = TypeVar("Result")
CLOSED_OUTPUT = getattr(signal, "SIGPIPE", 13)  # not sent here: Python turns it into an error


class StopWaiting(BaseException):
    """A signal came while this process waited for data; not for `except Exception`."""


class StopSignal:
    """Turns signals into a request to save and stop, which the loop reads between steps.

    1. In its `with` block a signal only sets `signum` (and interrupts `wait_for`). Outside it there
       is nothing to save, and a signal ends the process as usual; the other ranks notice by the
       missing heartbeat (`trainer/ranks/watch.py`).
    2. A scheduler may signal one rank alone. So before each step the ranks sum their `votes`, and
       all `adopt` the result: they stop at the same step, for the same signal.
    3. A second SIGINT ends the process at once.
    """

    SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
    VOTES = (CLOSED_OUTPUT, *SIGNALS)

    def __init__(self) -> None:
        self.signum: int | None = None
        self.is_on = False
        self._is_waiting = False
        self._process: int | None = None
        self._previous: dict[int, Any] = {}  # handlers outside the block

    def __enter__(self) -> "StopSignal":
        self.is_on, self._process = True, os.getpid()
        for signum in self.SIGNALS:
            if signum != signal.SIGINT and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # nohup has this signal ignored, and it shall stay so
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self.is_on = False
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def votes(self) -> list[float]:
        """For each of `VOTES`, 1 if this rank received it, else 0."""
        return [float(self.signum == signum) for signum in self.VOTES]

    def adopt(self, votes: list[float]) -> bool:
        """Take the sums of all ranks' votes; return whether to stop.

        Of several signals the last in `VOTES` counts. One that came after the votes is kept for
        the next vote.
        """
        sent = [signum for signum, count in zip(self.VOTES, votes, strict=True) if count]
        if sent:
            self.signum = sent[-1]
        return bool(sent)

    def ask(self, signum: int) -> None:
        """Request a stop as if this signal had come."""
        self.signum = signum if self.signum is None else self.signum

    def wait_for(self, get: Callable[[], Result]) -> Result:
        """Call `get()`, which a signal may interrupt.

        Raises:
            StopWaiting: a signal came before it returned, perhaps before it was called.
        """
        self._is_waiting = True
        try:
            if self.signum is not None:
                raise StopWaiting
            return get()
        finally:
            self._is_waiting = False

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker that has only just been forked
        if self.signum is not None and signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
            raise KeyboardInterrupt
        self.signum = signum
        if is_main_process():  # os.write, since print may be interrupted in the middle of itself
            name = signal.Signals(signum).name
            line = f"\n{name}: will save and leave after this step; Ctrl-C again leaves at once\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
        if self._is_waiting:
            self._is_waiting = False
            raise StopWaiting


def leave_signals_to_parent() -> None:
    """Ignore signals in a data worker: schedulers and terminals send them to the whole process
    group, but the main process still needs its workers, and ends them itself."""
    for signum in StopSignal.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
