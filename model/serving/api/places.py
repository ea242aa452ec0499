"""Owns the server's queue: places in it, slots to run, and clients that disconnect."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator

import anyio

from model.serving.api.protocol.fields import ApiError

MAX_WAIT_S = 600  # for a free slot


class Places:
    """Bounds the requests that the server holds.

    A request holds a place from before its body is read, and a slot while its answer is generated.
    Beam searches and requests for several answers, which compute more than one does, run one at a
    time: they never hold more than one of several slots.

    Args:
        concurrency: slots.
        queue: requests that may wait beside those with a slot.
    """

    def __init__(self, *, concurrency: int, queue: int):
        self._free, self._large = asyncio.Semaphore(concurrency), asyncio.Semaphore(1)
        self._num_places = concurrency + queue
        self._num_held = 0
        self.num_running = 0  # with a slot

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for a request, from before its body is read.

        Raises:
            ApiError: 429 if none is left.
        """
        if self._num_held == self._num_places:
            raise ApiError(429, "too many requests are waiting; try again later", code="queue_full")
        self._num_held += 1
        try:
            yield
        finally:
            self._num_held -= 1

    @property
    def num_waiting(self) -> int:
        """Requests with a place and no slot: they are read, or wait."""
        return self._num_held - self.num_running

    @contextlib.asynccontextmanager
    async def slot(self, *, is_large: bool = False) -> AsyncIterator[None]:
        """Wait for a free slot and hold it.

        Args:
            is_large: it waits for the large one before it, and only then for a slot.
        Raises:
            ApiError: 503 if the wait is too long.
        """
        async with contextlib.AsyncExitStack() as held:
            try:
                with anyio.fail_after(MAX_WAIT_S):
                    for gate in (self._large, self._free) if is_large else (self._free,):
                        await held.enter_async_context(gate)
            except TimeoutError:
                raise ApiError(503, "the server is overloaded; try again later") from None
            self.num_running += 1
            try:
                yield
            finally:
                self.num_running -= 1


class Gone(Exception):
    """The client has disconnected; its request is abandoned."""


class Client:
    """Whether the client is still connected. Threads ask: they cannot be stopped from outside."""

    def __init__(self) -> None:
        self.is_gone = threading.Event()

    def check(self) -> None:
        """Raises `Gone` if the client has disconnected."""
        if self.is_gone.is_set():
            raise Gone
