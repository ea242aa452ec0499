"""Owns the heartbeats by which ranks learn that another rank died, hangs or left.

1. A thread of each rank writes a counter (a beat) under the rank's key in the launcher's store,
   and reads the others' (`RankWatch._beat`). So a rank that is slow, loading or saving still
   beats; one that was killed or stopped, or whose machine is lost, does not.
2. A rank whose counter has not changed for `timeout_s` counts as silent (`Beats`).
3. A rank that leaves its `with` block by an error writes the error into its last beat.
4. A guard thread ends this process when another rank is silent, or left with an error `timeout_s`
   ago (`RankWatch._guard`). The main thread may hang in a collective that nothing else ends.
5. Where a collective fails first, the main thread names the rank that is missing
   (`RankWatch._name_lost`).
"""

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

BEATS_PER_TIMEOUT = 10
MISSED_BEATS = 3  # count as silence once a collective has failed
CONNECT_TIMEOUT = timedelta(minutes=10)  # rank 0 may be slow to open the store


class Beats:
    """The last beat of each rank, and when it changed by this process's monotonic clock: clocks
    of machines need not agree."""

    def __init__(self, rank: int, world_size: int, *, interval_s: float):
        self.rank, self.world_size, self.interval_s = rank, world_size, interval_s
        self._values: dict[int, bytes] = {}
        self._changed: set[int] = set()  # ranks seen to beat: theirs is no earlier launch's
        self._heard_s: dict[int, float] = {}
        self._round_s: float | None = None

    def hear(self, values: list[bytes], now_s: float) -> None:
        """Take in the values of all ranks, in rank order.

        A rank's first value may be left from an earlier launch, so only a change counts as a beat.
        """
        was_away = self._round_s is not None and now_s - self._round_s > 5 * self.interval_s
        for rank, value in enumerate(values):
            is_new = rank in self._values and self._values[rank] != value
            if is_new:
                self._changed.add(rank)
            if is_new or (was_away and rank in self._heard_s):  # we did not read
                self._heard_s[rank] = now_s
            self._values[rank] = value
        self._round_s = now_s

    def expect_all(self, now_s: float) -> None:
        """Let a rank that was never heard be silent from now on."""
        for rank in range(self.world_size):
            self._heard_s.setdefault(rank, now_s)

    def about(self, rank: int) -> dict[str, Any]:
        """A rank's last beat; empty before the first."""
        beat: dict[str, Any] = json.loads(self._values.get(rank) or b"{}")
        return beat

    def left(self) -> str | None:
        """The lowest rank that left with an error, and that error's text."""
        for rank in sorted(self._changed):
            reason = self.about(rank).get("left")
            if reason and rank != self.rank:
                return f"{self.name(rank)} left: {reason}"
        return None

    def silent(self, limit_s: float, now_s: float) -> str | None:
        """The rank that has been silent longest, if that is longer than `limit_s`."""
        waits = {
            rank: now_s - heard_s
            for rank, heard_s in self._heard_s.items()
            if rank != self.rank and not self.about(rank).get("is_done")
        }
        if not waits or max(waits.values()) <= limit_s:
            return None
        rank = max(waits, key=waits.__getitem__)
        return (
            f"{self.name(rank)} has been silent for {waits[rank]:.0f} s: it was killed, hangs, or "
            "its machine is lost; go on with --from_resume 1 on the ranks that are left"
        )

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.about(rank).get('who', 'not heard of yet')})"


class RankWatch:
    """Watches the other ranks during a `with` block, where a launcher started this process.

    When a rank is silent for `timeout_s`, or left with an error, this process prints a message
    that names the rank, and ends.
    """

    def __init__(self, *, timeout_s: float):
        self.timeout_s = timeout_s
        self.lost: str | None = None  # set when the block is left by a RuntimeError
        self._interval_s = timeout_s / BEATS_PER_TIMEOUT
        self._leaving: dict[str, Any] = {}  # added to the last beat
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._round_s: float | None = None
        self._beats = Beats(0, 1, interval_s=self._interval_s)  # until a launcher's are known

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

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if not self._threads:
            return
        # A collective raises RuntimeError when a rank is gone.
        if isinstance(error, RuntimeError) and self._beats.world_size > 1:
            self.lost = self._name_lost()
        reason = self.lost or (f"{type(error).__name__}: {error}" if error is not None else None)
        self._leaving = {"left": reason, "is_done": True}
        self._ended.set()
        self._threads[0].join(timeout=2)  # for the last beat

    def _name_lost(self) -> str | None:
        """Name the rank that left, or is silent for a few beats; None if all are heard."""
        self._beats.expect_all(time.monotonic())  # all took part in the collective that failed
        deadline_s = time.monotonic() + (MISSED_BEATS + 2) * self._interval_s + 1
        while time.monotonic() < deadline_s:
            limit_s = MISSED_BEATS * self._interval_s
            lost = self._beats.left() or self._beats.silent(limit_s, time.monotonic())
            if lost:
                return lost
            time.sleep(self._interval_s / 4)
        return self._store_is_gone(MISSED_BEATS * self._interval_s)

    def _beat(self) -> None:
        """Write and read beats until the block ends; reconnect where the store fails."""
        store: Store | None = None
        count = 0
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
            except RuntimeError:  # DistError and its subclasses; the guard counts the time
                store = None
            if is_last:
                return
            self._ended.wait(self._interval_s)

    def _guard(self) -> None:
        """End this process when a rank is lost, whatever the other threads wait for.

        A rank that left with an error is given `timeout_s`, in which this process may end by
        itself with an error of its own.
        """
        before_s = time.monotonic()
        left_s: float | None = None
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
    """End this process without cleaning up: an orderly exit would wait for collectives under way,
    until they time out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def key(rank: int) -> str:
    return f"minimind/beat/{rank}"


def connect(world_size: int) -> Store:
    """A client of the launcher's store, with every rank's key created."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=CONNECT_TIMEOUT,
    )
    for rank in range(world_size):
        store.compare_set(key(rank), "", "{}")
    return store
