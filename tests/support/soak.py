"""Offers a soak test of a running server: clients of all kinds, and its memory before and after."""

import collections
import random
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

MAX_GROWTH = 0.05  # of the memory
QUIET_S = 2  # before the memory is read: what clients left behind has ended by then


@dataclass(frozen=True)
class Behaviour:
    """What one client does once.

    Args:
        act: raises where a good request is not answered as it should be; what a bad client gets
            is its own affair.
        share: how often it comes, compared with the others.
    """

    name: str
    act: Callable[[random.Random], None]
    share: int = 1


@dataclass
class Soak:
    """Clients of several behaviours at once against one process.

    Args:
        pid: of the server. num_clients: at once. seed: draws who comes when.
    """

    pid: int
    behaviours: list[Behaviour]
    num_clients: int = 6
    seed: int = 0
    counts: collections.Counter = field(default_factory=collections.Counter)

    def run(self, *, num_acts: int | None = None, seconds: float = float("inf")) -> None:
        """Go on until so many acts or seconds are over; raises what a good client found wrong."""
        deadline, left = time.monotonic() + seconds, iter(range(num_acts or 2**62))
        lock, has_failed = threading.Lock(), threading.Event()

        def be_clients(number: int) -> None:
            rng = random.Random(f"{self.seed} {number} {sum(self.counts.values())}")
            shares = [behaviour.share for behaviour in self.behaviours]
            while time.monotonic() < deadline and not has_failed.is_set():
                with lock:
                    if (i := next(left, None)) is None:
                        return
                # Each comes once before chance decides.
                rest = self.behaviours[i : i + 1] or rng.choices(self.behaviours, shares)
                behaviour = rest[0]
                try:
                    behaviour.act(rng)
                except BaseException:
                    has_failed.set()
                    raise
                with lock:
                    self.counts[behaviour.name] += 1

        with ThreadPoolExecutor(self.num_clients) as pool:
            for result in [pool.submit(be_clients, i) for i in range(self.num_clients)]:
                result.result()

    def memory_mib(self) -> float:
        """What the process holds once it has come to rest."""
        time.sleep(QUIET_S)
        read = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=True
        )
        return int(read.stdout) / 1024
