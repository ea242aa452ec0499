"""Owns how training waits for data: batches from data workers that may fail, hang or be killed.

Whatever happens to a worker reaches the loop as a `DataFault` that names the sample, or, where a
signal came first, as `StopWaiting`; and no worker is left behind.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from trainer.ranks.signals import StopSignal, leave_signals_to_parent

POLL_S = 1.0  # between two looks at the workers
PROCESS, SAMPLE, MOVES, FIELDS = 0, 1, 2, 3  # of a worker's place on the board


class DataFault(ValueError):
    """This rank cannot have its next batch; says which sample or worker, and why."""


@dataclass(frozen=True)
class Failure:
    """What a worker hands over in place of a batch. An exception would have to be rebuilt from its
    text in the main process, which not every type allows."""

    reason: str
    trace: str


class Board:
    """Where workers write what they do: process, sample (from 1; 0 between two), moves so far."""

    def __init__(self, num_workers: int):
        self._values = multiprocessing.RawArray("q", FIELDS * num_workers)

    def write(self, worker: int, *, sample: int) -> None:
        start = worker * FIELDS
        self._values[start + PROCESS] = os.getpid()
        self._values[start + SAMPLE] = sample
        self._values[start + MOVES] += 1

    def read(self) -> list[tuple[int, ...]]:
        values = list(self._values)
        return [tuple(values[i : i + FIELDS]) for i in range(0, len(values), FIELDS)]


class Watched(Dataset):
    """A data set that tells which sample is being made, and whose errors become a `Failure`."""

    def __init__(self, dataset: Dataset, board: Board):
        self.dataset, self.board = dataset, board

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        worker = get_worker_info()
        number = worker.id if worker else 0
        self.board.write(number, sample=index + 1)
        try:
            return self.dataset[index]
        except Exception as error:  # of any kind: the run is to be saved, and to name the sample
            words = first_line(error)
            return Failure(f"{self.dataset.where(index)}: {words}", traceback.format_exc())
        finally:
            self.board.write(number, sample=0)


def first_line(error: BaseException) -> str:
    """Type and words of an error."""
    return ": ".join(filter(None, (type(error).__name__, str(error).partition("\n")[0])))


def collate_or_fail(collate: Callable, samples: list):
    """A batch, or the first failure among its samples."""
    failures = [sample for sample in samples if isinstance(sample, Failure)]
    return failures[0] if failures else collate(samples)


class Loader:
    """Batches of a data set, each pass over them with workers of its own.

    Args:
        dataset: has `where(index)`, which names a sample.
        sampler: this rank's batches of indices.
        stop: ends the wait for a batch.
        patience_s: how long no worker may make any progress while a batch is waited for.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler[list[int]],
        *,
        collate: Callable,
        num_workers: int,
        pin_memory: bool,
        seed: int,
        stop: StopSignal,
        patience_s: float,
    ):
        self._dataset, self._stop, self._patience_s = dataset, stop, patience_s
        self._board = Board(max(num_workers, 1))
        self._num_workers = num_workers
        self._batches = DataLoader(
            Watched(dataset, self._board),
            batch_sampler=sampler,
            collate_fn=partial(collate_or_fail, collate),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=partial(start_worker, self._board),
            # Its own generator: drawing from the global one would make a resumed run differ.
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator:
        """Raises `DataFault` or `StopWaiting`; closing it ends the workers in any case."""
        before, workers = set(multiprocessing.active_children()), []
        source, is_done = None, False
        try:
            try:
                with sigchld_as_before():
                    source = iter(self._batches)
            except (OSError, RuntimeError) as error:
                raise DataFault(f"data workers cannot be started ({first_line(error)})") from error
            finally:
                workers += set(multiprocessing.active_children()) - before
            guard = Guard(self._board, workers, self._dataset, patience_s=self._patience_s)
            with guard:
                for _ in range(len(self)):
                    yield self._next(source, guard)
            is_done = True
        finally:
            if not is_done:
                kill(workers)
            del source  # tells its workers to end, and waits for them
            kill(workers)

    def _next(self, source: Iterator, guard: "Guard"):
        try:
            with guard.waiting():
                batch = self._stop.wait_for(partial(next, source))
        except Exception as error:
            reason = guard.what_happened() or f"no batch could be made ({first_line(error)})"
            raise DataFault(reason) from error
        if isinstance(batch, Failure):
            fault = DataFault(batch.reason)
            fault.add_note(batch.trace)
            raise fault
        return batch


class Guard:
    """Kills the workers of a pass, in a `with` block, when they hang while a batch is waited for.

    Nothing else ends every such wait: what a worker hands over is read out of its process, and
    that has no time limit.
    """

    def __init__(self, board: Board, workers: list, dataset: Dataset, *, patience_s: float):
        self._board, self._workers, self._dataset = board, workers, dataset
        self._patience_s = patience_s
        self._waits_since_s: float | None = None
        self._verdict: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="data guard", daemon=True)

    def __enter__(self) -> "Guard":
        if self._workers:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time in which the workers must make progress."""
        self._waits_since_s = time.monotonic()
        try:
            yield
        finally:
            self._waits_since_s = None

    def _watch(self) -> None:
        seen, moved_s = self._board.read(), time.monotonic()
        looked_s = moved_s
        while not self._ended.wait(POLL_S):
            now_s, places = time.monotonic(), self._board.read()
            was_away = now_s - looked_s > 5 * POLL_S  # stopped, or the machine slept
            has_all = sum(place[PROCESS] > 0 for place in places) == len(self._workers)
            if places != seen or was_away or not has_all:
                seen, moved_s = places, now_s
            looked_s, waits_since_s = now_s, self._waits_since_s
            if waits_since_s is None:
                continue
            silent_s = now_s - max(moved_s, waits_since_s)
            if silent_s > self._patience_s:
                self._verdict = self._name_hanging(places, silent_s)
                for worker in self._workers:
                    worker.kill()
                return

    def what_happened(self) -> str | None:
        """Which worker made the wait fail, and how; None if all of them live."""
        if self._verdict or not self._workers:
            return self._verdict
        # Its connections end a moment before it has.
        wait([worker.sentinel for worker in self._workers], timeout=POLL_S)
        for worker in self._workers:
            code = worker.exitcode
            if code is None:
                continue
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended ({code})"
            places = [place for place in self._board.read() if place[PROCESS] == worker.pid]
            at = "".join(map(self._where, places))
            return (
                f"data worker {worker.pid} {how}{at}; memory or /dev/shm may be full: use fewer "
                "--num_workers"
            )
        return None

    def _where(self, place: tuple[int, ...]) -> str:
        return f" at {self._dataset.where(place[SAMPLE] - 1)}" if place[SAMPLE] else ""

    def _name_hanging(self, places: list[tuple[int, ...]], silent_s: float) -> str:
        busy = [place for place in places if place[SAMPLE]] or places
        names = ", ".join(f"{place[PROCESS]}{self._where(place)}" for place in busy)
        return (
            f"no data for {silent_s:.0f} s: hanging data worker(s): {names}; look at the storage "
            "of the images, or raise --rank_timeout where it is only slow"
        )


@contextlib.contextmanager
def sigchld_as_before() -> Iterator[None]:
    """Undo that PyTorch raises a worker's death wherever the main process is, perhaps in the
    middle of an update or a save; who waits for data notices it too."""
    signum = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(signum) if signum else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signum, before)


def kill(workers: list) -> None:
    """End processes that may ignore every other way."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def start_worker(board: Board, worker: int) -> None:
    """Data workers leave signals to the main process, and end with it however it ends."""
    leave_signals_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    board.write(worker, sample=0)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # PyTorch watches the fork server, where there is one
    os._exit(1)
