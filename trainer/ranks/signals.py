"""Owns signals: which of them ask training to save and leave, and what the ranks agree on."""

import contextlib
import os
import signal
from collections.abc import Callable

from trainer.ranks.group import is_main_process

# What schedulers, terminals and users send; not all of them exist everywhere. SIGTERM is last, so
# it counts where ranks were sent several.
NAMES = ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTERM")
CLOSED_OUTPUT = getattr(signal, "SIGPIPE", 13)  # not sent here: Python turns it into an error


class StopWaiting(BaseException):
    """A signal came while this process waited for data; not for `except Exception`."""


class StopSignal:
    """Turns signals into a wish to save and leave, which the loop reads between steps.

    It does so within its `with` block. Before that there is nothing to save, and the signals end
    the program at once as they end any other, whatever it is just doing; a rank that is ended so
    is missed by the others (`trainer/ranks/watch.py`).

    A second SIGINT ends the program at once. A scheduler may signal any one rank: the ranks sum
    their `votes` and `adopt` the outcome, so that all of them leave alike.
    """

    SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
    VOTES = (CLOSED_OUTPUT, *SIGNALS)

    def __init__(self):
        self.signum: int | None = None
        self.is_on = False
        self._is_waiting = False
        self._process = None
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        self.is_on, self._process = True, os.getpid()
        for signum in self.SIGNALS:
            if signum != signal.SIGINT and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # as nohup does: whoever started this wants it to live on
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        self.is_on = False
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def votes(self) -> list[float]:
        """For each signal, whether this rank was sent it."""
        return [float(self.signum == signum) for signum in self.VOTES]

    def adopt(self, votes: list[float]) -> bool:
        """Take over what the ranks were sent (SIGTERM over others); whether to stop. A signal that
        came after the votes is kept for the next ones."""
        sent = [signum for signum, count in zip(self.VOTES, votes, strict=True) if count]
        if sent:
            self.signum = sent[-1]
        return bool(sent)

    def ask(self, signum: int) -> None:
        """Wish to leave as if this signal had come."""
        self.signum = signum if self.signum is None else self.signum

    def wait_for(self, get: Callable):
        """What `get()` returns.

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

    def _note(self, signum: int, _frame) -> None:
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
    """For data workers: schedulers and terminals signal whole groups of processes, and the main
    process still needs them, or ends them."""
    for signum in StopSignal.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
