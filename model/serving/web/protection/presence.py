"""Owns who is there: visitors and their pages, by the requests they hold open and the last one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class _Stay:
    """Requests that are open now, and when one was last seen to begin or end."""

    num_open: int = 0
    last_s: float = 0.0


class Presence:
    """Counts requests by name. For one thread: the server's event loop.

    Args:
        is_worth: whether a name without an open request is remembered; strangers who ask once
            under ever new names must not fill the memory.
        clock: seconds that never run backwards.
    """

    def __init__(self, is_worth: Callable[[str], bool], *, clock=time.monotonic):
        self._is_worth, self._clock = is_worth, clock
        self._stays: dict[str, _Stay] = {}

    @contextmanager
    def here(self, name: str) -> Iterator[None]:
        """While a request of theirs is handled; a page holds one open as long as it is shown."""
        stay = self._stays.setdefault(name, _Stay())
        stay.num_open += 1
        stay.last_s = self._clock()
        try:
            yield
        finally:
            stay.num_open -= 1
            stay.last_s = self._clock()
            if stay.num_open == 0 and not self._is_worth(name):
                self._stays.pop(name, None)

    def pop_gone(self, after_s: float) -> list[str]:
        """Those without any request for longer than that; they are forgotten here."""
        now_s = self._clock()
        gone = [
            name
            for name, stay in self._stays.items()
            if stay.num_open == 0 and now_s - stay.last_s > after_s
        ]
        for name in gone:
            del self._stays[name]
        return gone
