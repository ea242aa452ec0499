"""Owns knowing which visitors and pages are still there, by their open and latest requests."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class _Stay:
    """Open requests of one name, and when one last began or ended."""

    num_open: int = 0
    last_s: float = 0.0


class Presence:
    """Counts requests by name. For one thread: the server's event loop.

    Args:
        is_worth: whether a name is remembered once it has no open request; clients that take a
            new name for each request must not fill the memory.
        clock: monotonic seconds.
    """

    def __init__(
        self, is_worth: Callable[[str], bool], *, clock: Callable[[], float] = time.monotonic
    ):
        self._is_worth, self._clock = is_worth, clock
        self._stays: dict[str, _Stay] = {}

    @contextmanager
    def here(self, name: str) -> Iterator[None]:
        """Count a request while it is handled; a page holds one open as long as it is shown."""
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
        """Names without any request for longer than that; they are removed from here."""
        now_s = self._clock()
        gone = [
            name
            for name, stay in self._stays.items()
            if stay.num_open == 0 and now_s - stay.last_s > after_s
        ]
        for name in gone:
            del self._stays[name]
        return gone
