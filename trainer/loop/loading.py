"""Owns how training waits for data: batches from data workers that may fail, hang or be killed.

1. Each worker writes on a shared `Board` which sample it is making (`Watched`).
2. An error in a sample travels to the main process as a `Failure`, which is raised as `DataFault`.
3. A worker that dies makes the wait for a batch fail. The main process looks up its sample on the
   board and raises `DataFault`.
4. While a batch is waited for, the `Guard` thread reads the board. If no worker writes on it for
   `patience_s`, it kills them all, so that the wait fails as in 3.
5. A signal ends the wait with `StopWaiting`.
6. However the pass ends, its workers are killed (`Loader.__iter__`).
7. While the samples themselves come from another machine (`Supply`), no worker counts as hanging.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from model.machine.heap import give_back_at_once
from trainer.ranks.signals import StopSignal, leave_signals_to_parent

POLL_S = 1.0  # between two looks at the workers
DEATH_S = 5.0  # within which a worker whose connection closed counts as ended, on a busy machine
PROCESS, SAMPLE, MOVES, FIELDS = 0, 1, 2, 3  # columns of a worker's row on the board, and how many


class NamedSamples(Protocol):
    """A data set that can name its samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def where(self, index: int) -> str: ...


class Supply(Protocol):
    """Brings samples from other machines to this one."""

    @property
    def is_waiting(self) -> bool: ...

    def prepare(self) -> None: ...

    def close(self) -> None: ...


class DataFault(ValueError):
    """This rank cannot have its next batch; says which sample or worker, and why."""


@dataclass(frozen=True)
class Failure:
    """What a worker returns in place of a sample that raised. An exception itself would have to be
    pickled, which not every type allows."""

    reason: str
    trace: str


class Board:
    """Shared memory with one row a worker: its process id, the sample it is making (from 1; 0
    between two), and how often it has written here."""

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


class Watched(Dataset[Any]):
    """A data set that writes on the board which sample it makes, and whose errors become a
    `Failure`."""

    def __init__(self, dataset: NamedSamples, board: Board):
        self.dataset, self.board = dataset, board

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        number = worker.id if worker else 0
        self.board.write(number, sample=index + 1)
        try:
            return self.dataset[index]
        except Exception as error:  # of any kind: the run is to be saved, and to name the sample
            reason = f"{self.dataset.where(index)}: {first_line(error)}"
            return Failure(reason, traceback.format_exc())
        finally:
            self.board.write(number, sample=0)


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return ": ".join(filter(None, (type(error).__name__, str(error).partition("\n")[0])))


def collate_or_fail(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A batch, or the first failure among its samples."""
    failures = [sample for sample in samples if isinstance(sample, Failure)]
    return failures[0] if failures else collate(samples)


class Loader:
    """Batches of a data set. Each pass over them (`iter`) starts workers of its own.

    Args:
        sampler: this rank's batches of indices.
        stop: a signal that ends the wait for a batch.
        patience_s: seconds without progress of any worker, while a batch is waited for, after
            which they count as hanging.
        supply: what the samples wait for, if they come from another machine.
    """

    def __init__(
        self,
        dataset: NamedSamples,
        sampler: Sampler[list[int]],
        *,
        collate: Callable[[list[Any]], Any],
        num_workers: int,
        pin_memory: bool,
        seed: int,
        stop: StopSignal,
        patience_s: float,
        supply: Supply | None = None,
    ):
        self._dataset, self._stop, self._patience_s = dataset, stop, patience_s
        self._supply = supply
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

    def __iter__(self) -> Generator[Any]:
        """The batches of a pass; closing the generator ends the workers.

        Raises:
            DataFault: a batch cannot be made. StopWaiting: a signal came first.
        """
        before = set(multiprocessing.active_children())
        workers: list[BaseProcess] = []
        source: Iterator[Any] | None = None
        is_done = False
        try:
            if self._supply is not None:
                self._stop.wait_for(self._supply.prepare)
            try:
                with sigchld_as_before():
                    source = iter(self._batches)
            except (OSError, RuntimeError) as error:
                raise DataFault(f"data workers cannot be started ({first_line(error)})") from error
            finally:
                workers += set(multiprocessing.active_children()) - before
            guard = Guard(
                self._board,
                workers,
                self._dataset,
                patience_s=self._patience_s,
                supply=self._supply,
            )
            with guard:
                for _ in range(len(self)):
                    yield self._next(source, guard)
            is_done = True
        finally:
            if self._supply is not None:
                self._supply.close()
            if not is_done:
                kill(workers)
            del source  # its destructor asks the workers to end, and waits for them
            kill(workers)

    def _next(self, source: Iterator[Any], guard: "Guard") -> Any:
        try:
            with guard.waiting():
                batch = self._stop.wait_for(partial(next, source))
        except DataFault:
            raise
        except Exception as error:
            reason = guard.what_happened() or f"no batch could be made ({first_line(error)})"
            raise DataFault(reason) from error
        if isinstance(batch, Failure):
            fault = DataFault(batch.reason)
            fault.add_note(batch.trace)
            raise fault
        return batch


class Guard:
    """A thread that kills the workers of a pass if they hang. It runs during a `with` block.

    1. The main process marks the time in which it waits for a batch (`waiting`).
    2. Once a second the thread reads the board. Progress is any change of it.
    3. If there was no progress for `patience_s`, all of that time within one wait, the thread
       notes which samples the workers were making, kills all workers and ends.
    4. The wait then fails in the main process, which asks `what_happened`.

    The clock starts anew until every worker has begun, and after this process itself was stopped.
    A time limit on the wait would not do: the main process may block while it receives a batch
    from a worker, and that has no time limit.
    """

    def __init__(
        self,
        board: Board,
        workers: list[BaseProcess],
        dataset: NamedSamples,
        *,
        patience_s: float,
        supply: Supply | None = None,
    ):
        self._board, self._workers, self._dataset = board, workers, dataset
        self._patience_s, self._supply = patience_s, supply
        self._waits_since_s: float | None = None
        self._verdict: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="data guard", daemon=True)

    def __enter__(self) -> "Guard":
        if self._workers:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which a batch is waited for, so the workers must make progress."""
        self._waits_since_s = time.monotonic()
        try:
            yield
        finally:
            self._waits_since_s = None

    def _watch(self) -> None:
        seen, moved_s = self._board.read(), time.monotonic()
        looked_s = moved_s
        while not self._ended.wait(POLL_S):
            now_s, rows = time.monotonic(), self._board.read()
            was_away = now_s - looked_s > 5 * POLL_S  # stopped, or the machine slept
            have_all_begun = sum(row[PROCESS] > 0 for row in rows) == len(self._workers)
            is_supplied = self._supply is None or not self._supply.is_waiting
            if rows != seen or was_away or not have_all_begun or not is_supplied:
                seen, moved_s = rows, now_s
            looked_s, waits_since_s = now_s, self._waits_since_s
            if waits_since_s is None:
                continue
            silent_s = now_s - max(moved_s, waits_since_s)
            if silent_s > self._patience_s:
                self._verdict = self._name_hanging(rows, silent_s)
                for worker in self._workers:
                    worker.kill()
                return

    def what_happened(self) -> str | None:
        """Why the wait failed: which workers hung, or which one ended; None if all are alive."""
        if self._verdict or not self._workers:
            return self._verdict
        # As a worker ends, its connection closes first, then its sentinel's pipe, and only then
        # does the system have its exit status.
        closed = wait([worker.sentinel for worker in self._workers], timeout=DEATH_S)
        for worker in self._workers:
            if worker.sentinel in closed:
                worker.join(DEATH_S)
            code = worker.exitcode
            if code is None:
                continue
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended ({code})"
            rows = [row for row in self._board.read() if row[PROCESS] == worker.pid]
            at = "".join(map(self._where, rows))
            return (
                f"data worker {worker.pid} {how}{at}; memory or /dev/shm may be full: use fewer "
                "--num_workers"
            )
        return None

    def _where(self, row: tuple[int, ...]) -> str:
        return f" at {self._dataset.where(row[SAMPLE] - 1)}" if row[SAMPLE] else ""

    def _name_hanging(self, rows: list[tuple[int, ...]], silent_s: float) -> str:
        busy = [row for row in rows if row[SAMPLE]] or rows
        names = ", ".join(f"{row[PROCESS]}{self._where(row)}" for row in busy)
        return (
            f"no data for {silent_s:.0f} s: hanging data worker(s): {names}; look at the storage "
            "of the images, or raise --rank_timeout where it is only slow"
        )


@contextlib.contextmanager
def sigchld_as_before() -> Iterator[None]:
    """Restore the handler of SIGCHLD after the block, in which PyTorch sets its own.

    PyTorch's raises a worker's death wherever the main process is, perhaps in the middle of an
    update or a save. The next wait for a batch notices the death too.
    """
    signum: int | None = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = None if signum is None else signal.getsignal(signum)
    try:
        yield
    finally:
        if signum is not None and before is not None:
            signal.signal(signum, before)


def kill(workers: list[BaseProcess]) -> None:
    """End processes that may be beyond reacting to anything milder, and wait for their end."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def start_worker(board: Board, worker: int) -> None:
    """Prepare a data worker: it ignores signals, and ends when the main process ends in any way."""
    leave_signals_to_parent()
    give_back_at_once()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    board.write(worker, sample=0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()  # PyTorch watches the fork server, where there is one
    assert parent is not None
    parent.join()
    os._exit(1)
