"""Owns how ranks know of one another's life: who died, hangs or left, so that nobody waits for it.

Each rank writes a beat into the launcher's key-value store and reads the others'. The beat comes
from a thread of its own: a rank that is slow, loading or saving still beats; one that was killed or
stopped, or whose machine is lost, does not.
"""

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

BEATS_PER_TIMEOUT = 10
MISSED_BEATS = 3  # of a rank that a collective just failed for
CONNECT_TIMEOUT = timedelta(minutes=10)  # rank 0 may be slow to open the store


class Beats:
    """What is known of the others' beats. Times are this process's own, so that clocks of
    different machines, or a clock that is set, do not matter."""

    def __init__(self, rank: int, world_size: int, *, interval_s: float):
        self.rank, self.world_size, self.interval_s = rank, world_size, interval_s
        self._values: dict[int, bytes] = {}
        self._changed: set[int] = set()  # ranks whose beat was seen to change: of this launch
        self._heard_s: dict[int, float] = {}
        self._round_s: float | None = None

    def hear(self, values: list[bytes], now_s: float) -> None:
        """Take in one value of every rank. The first of each may be of an earlier launch."""
        was_away = self._round_s is not None and now_s - self._round_s > 5 * self.interval_s
        for rank, value in enumerate(values):
            is_new = rank in self._values and self._values[rank] != value
            if is_new:
                self._changed.add(rank)
            if is_new or (was_away and rank in self._heard_s):  # it was we who did not listen
                self._heard_s[rank] = now_s
            self._values[rank] = value
        self._round_s = now_s

    def expect_all(self, now_s: float) -> None:
        """From now on a rank counts as silent even if it was never heard."""
        for rank in range(self.world_size):
            self._heard_s.setdefault(rank, now_s)

    def about(self, rank: int) -> dict:
        return json.loads(self._values.get(rank) or b"{}")

    def left(self) -> str | None:
        """The first rank that left with an error, and its words."""
        for rank in sorted(self._changed):
            reason = self.about(rank).get("left")
            if reason and rank != self.rank:
                return f"{self.name(rank)} left: {reason}"
        return None

    def silent(self, limit_s: float, now_s: float) -> str | None:
        """The rank that has been silent longest, and beyond a limit."""
        waits = {
            rank: now_s - heard_s
            for rank, heard_s in self._heard_s.items()
            if rank != self.rank and not self.about(rank).get("is_done")
        }
        if not waits or max(waits.values()) <= limit_s:
            return None
        rank = max(waits, key=waits.get)
        return (
            f"{self.name(rank)} has been silent for {waits[rank]:.0f} s: it was killed, hangs, or "
            "its machine is lost; go on with --from_resume 1 on the ranks that are left"
        )

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.about(rank).get('who', 'not heard of yet')})"


class RankWatch:
    """Watches the other ranks for the length of a `with` block, where a launcher started several.

    A rank that is silent for `timeout_s`, or left with an error, ends this process with a message
    that names it: nothing else ends a collective that waits for it.
    """

    def __init__(self, *, timeout_s: float):
        self.timeout_s = timeout_s
        self.lost: str | None = None  # set when the block is left by a RuntimeError
        self._interval_s = timeout_s / BEATS_PER_TIMEOUT
        self._leaving: dict = {}  # what the last beat says
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._round_s: float | None = None
        self._beats: Beats | None = None

    def __enter__(self) -> "RankWatch":
        if "RANK" not in os.environ:
            return self
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._beats = Beats(rank, world_size, interval_s=self._interval_s)
        for target in (self._beat, self._guard):
            thread = threading.Thread(target=target, name=target.__name__, daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, _type, error: BaseException | None, _trace) -> None:
        if not self._threads:
            return
        # A collective fails with a RuntimeError when a rank is gone.
        if isinstance(error, RuntimeError) and self._beats.world_size > 1:
            self.lost = self._name_lost()
        reason = self.lost or (f"{type(error).__name__}: {error}" if error is not None else None)
        self._leaving = {"left": reason, "is_done": True}
        self._ended.set()
        self._threads[0].join(timeout=2)  # for the last beat

    def _name_lost(self) -> str | None:
        """Who is missing, once a few beats should have been heard."""
        self._beats.expect_all(time.monotonic())  # for a collective all had come together
        deadline_s = time.monotonic() + (MISSED_BEATS + 2) * self._interval_s + 1
        while time.monotonic() < deadline_s:
            limit_s = MISSED_BEATS * self._interval_s
            lost = self._beats.left() or self._beats.silent(limit_s, time.monotonic())
            if lost:
                return lost
            time.sleep(self._interval_s / 4)
        return self._store_is_gone(MISSED_BEATS * self._interval_s)

    def _beat(self) -> None:
        """Write and read beats until the block ends; the store may fail and come back."""
        store, count = None, 0
        while True:
            is_last = self._ended.is_set()
            try:
                store = store or connect(self._beats.world_size)
                count += 1
                who = f"{socket.gethostname()}, process {os.getpid()}"
                beat = {"beat": count, "who": who} | (self._leaving if is_last else {})
                store.set(key(self._beats.rank), json.dumps(beat))
                values = store.multi_get([key(r) for r in range(self._beats.world_size)])
                self._beats.hear(values, time.monotonic())
                self._round_s = time.monotonic()
            except RuntimeError:  # DistError and its kind: the guard counts the time
                store = None
            if is_last:
                return
            self._ended.wait(self._interval_s)

    def _guard(self) -> None:
        """End this process when a rank is lost, whatever the other threads wait for."""
        before_s, left_s = time.monotonic(), None
        while not self._ended.wait(self._interval_s):
            now_s = time.monotonic()
            was_away = now_s - before_s > 5 * self._interval_s  # stopped, or the machine slept
            before_s = now_s
            if was_away:
                self._round_s = now_s if self._round_s is not None else None
                continue
            left = self._beats.left()
            left_s = (left_s or now_s) if left else None
            is_overdue = left_s is not None and now_s - left_s > self.timeout_s
            lost = left if is_overdue else self._beats.silent(self.timeout_s, now_s)
            lost = lost or self._store_is_gone(self.timeout_s)
            if lost and not self._ended.is_set():
                print(f"rank {self._beats.rank}: error: {lost}", file=sys.stderr, flush=True)
                leave_at_once(1)

    def _store_is_gone(self, limit_s: float) -> str | None:
        if self._round_s is None or time.monotonic() - self._round_s <= limit_s:
            return None
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return (
            f"rank 0 or its launcher, which keeps the ranks together at {place}, has been silent "
            f"for {time.monotonic() - self._round_s:.0f} s: it was killed, hangs, or its machine "
            "is lost; go on with --from_resume 1 on the ranks that are left"
        )


def leave_at_once(status: int) -> None:
    """End this process as it is. An orderly end would wait for collectives that were begun, and
    for as long as a rank that hangs takes part in one, that is until they time out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def key(rank: int) -> str:
    return f"minimind/beat/{rank}"


def connect(world_size: int) -> dist.Store:
    """A client of the launcher's store; every rank's key is there from then on."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        wait_for_workers=False, timeout=CONNECT_TIMEOUT,
    )  # fmt: skip
    for rank in range(world_size):
        store.compare_set(key(rank), "", "{}")
    return store
