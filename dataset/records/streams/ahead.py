"""Owns fetching ahead: while the records of a window are taken, the next window is fetched."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator

from dataset.records.streams.plan import Ids, Window
from dataset.records.streams.remote import Wanted


class Ahead:
    """The ids of windows, each once its shards are here.

    Args:
        windows: and how many records are left to take. fetch: brings a window's shards here, as
            long as they are wanted.
    """

    def __init__(
        self, windows: Iterator[tuple[Window, int]], fetch: Callable[[Window, Wanted], None]
    ):
        self._windows, self._fetch = windows, fetch
        self.is_waiting = False  # for another machine

    def __iter__(self) -> Generator[Ids]:
        """The ids of each window; closing the generator ends the fetching.

        Raises:
            StreamError: a shard cannot be had.
        """
        ready: queue.Queue[Ids | Exception | None] = queue.Queue()
        permits, ended = threading.Semaphore(1), threading.Event()
        thread = threading.Thread(
            target=self._work, args=(ready, permits, ended), name="stream", daemon=True
        )
        thread.start()
        try:
            while True:
                self.is_waiting = True
                found = ready.get()
                self.is_waiting = False
                if found is None:
                    return
                if isinstance(found, Exception):
                    raise found
                permits.release()  # for the next one
                yield found
        finally:
            self.is_waiting = False
            ended.set()
            permits.release()

    def _work(
        self,
        ready: "queue.Queue[Ids | Exception | None]",
        permits: threading.Semaphore,
        ended: threading.Event,
    ) -> None:
        try:
            permits.acquire()
            for window, num_left in self._windows:
                if ended.is_set():
                    return
                self._fetch(window, lambda: not ended.is_set())
                ready.put(window.ids()[:num_left])
                permits.acquire()
            ready.put(None)
        except Exception as error:  # it is raised where the ids are waited for
            ready.put(error)
