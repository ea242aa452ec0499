"""Owns slowing down password guessing.

1. A client that fails repeatedly must wait, twice as long after each failure.
2. After many failures by all clients together, attempts are made one at a time.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable

FREE_FAILURES = 5  # of one client in a row: people mistype
MAX_WAIT_S = 60  # of one client, after its wait has doubled with each failure
FORGET_S = 600  # after its last one, a client's failures are forgotten
MAX_CLIENTS = 10_000  # remembered; beyond that the one with the oldest failure is forgotten
BUSY_FAILURES, BUSY_WINDOW_S = 30, 60  # of all clients: from then on one attempt at a time
ONE_BY_ONE_S = 1.0  # for each of those
MAX_WAITING = 20  # attempts; further ones are refused


class Throttle:
    """Decides when a password may be tried. For one thread: the server's event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # count, last one
        self._recent: deque[float] = deque()  # failures of all
        self._one_by_one, self._num_waiting = asyncio.Lock(), 0

    def wait_s(self, client: str) -> float:
        """Seconds until a client may try again; 0 if now."""
        count, last_s = self._failures.get(client, (0, 0.0))
        if count < FREE_FAILURES:
            return 0.0
        pause_s = min(MAX_WAIT_S, 2.0 ** min(count - FREE_FAILURES, 16))
        return max(0.0, last_s + pause_s - self._clock())

    async def pass_one_by_one(self) -> bool:
        """After many recent failures, wait for earlier attempts; False if too many wait already."""
        now_s = self._clock()
        while self._recent and now_s - self._recent[0] > BUSY_WINDOW_S:
            self._recent.popleft()
        if len(self._recent) < BUSY_FAILURES:
            return True
        if self._num_waiting >= MAX_WAITING:
            return False
        self._num_waiting += 1
        try:
            async with self._one_by_one:
                await asyncio.sleep(ONE_BY_ONE_S)
        finally:
            self._num_waiting -= 1
        return True

    def note_attempt(self, client: str) -> None:
        """Count an attempt as failed before it is made, so that many at once are counted."""
        now_s = self._clock()
        count, last_s = self._failures.pop(client, (0, now_s))
        self._failures[client] = ((count if now_s - last_s <= FORGET_S else 0) + 1, now_s)
        self._recent.append(now_s)
        while len(self._failures) > MAX_CLIENTS:
            self._failures.popitem(last=False)

    def forgive(self, client: str) -> None:
        """Forget the client's failures: the password was right."""
        self._failures.pop(client, None)
        if self._recent:
            self._recent.pop()
