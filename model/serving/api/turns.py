"""Owns who has the server's time: places in the queue, turns, and who has left."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator

import anyio

from model.serving.api.request import ApiError

MAX_WAIT_S = 600  # for one's turn


class Turns:
    """Lets a few run at once and a limited number wait, those included that still send."""

    def __init__(self, *, concurrency: int, queue: int):
        self._free = asyncio.Semaphore(concurrency)
        self._num_places = concurrency + queue

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for a request, from before its body is read.

        Raises:
            ApiError: 429 if none is left.
        """
        if self._num_places == 0:
            raise ApiError(429, "too many requests are waiting; try again later", code="queue_full")
        self._num_places -= 1
        try:
            yield
        finally:
            self._num_places += 1

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for a turn and hold it.

        Raises:
            ApiError: 503 if the wait is too long.
        """
        try:
            with anyio.fail_after(MAX_WAIT_S):
                await self._free.acquire()
        except TimeoutError:
            raise ApiError(503, "the server is overloaded; try again later") from None
        try:
            yield
        finally:
            self._free.release()


class Gone(Exception):
    """The client has left: what a thread does for it is in vain."""


class Presence:
    """Whether the client is still there, for threads, which nobody can stop from outside."""

    def __init__(self):
        self.is_gone = threading.Event()

    def check(self) -> None:
        if self.is_gone.is_set():
            raise Gone
