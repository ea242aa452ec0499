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

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from trainer.ranks.signals import StopSignal, leave_signals_to_parent

POLL_S = 1.0  # between two looks at the workers while waiting for a batch
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
            timeout=POLL_S if num_workers else 0,
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
            for _ in range(len(self)):
                yield self._next(source, workers)
            is_done = True
        finally:
            if not is_done:
                kill(workers)
            del source  # tells its workers to end, and waits for them
            kill(workers)

    def _next(self, source: Iterator, workers: list):
        seen, since_s, looked_s = self._board.read(), time.monotonic(), time.monotonic()
        while True:
            try:
                batch = self._stop.wait_for(partial(next, source))
            except Exception as error:
                self._check_alive(workers)
                if not (workers and str(error).startswith("DataLoader timed out")):
                    raise DataFault(f"no batch could be made ({first_line(error)})") from error
            else:
                break
            now_s, now = time.monotonic(), self._board.read()
            was_away = now_s - looked_s > 5 * POLL_S  # stopped, or the machine slept
            has_all = all(place[PROCESS] for place in now)
            if now != seen or was_away or not has_all:
                seen, since_s = now, now_s
            looked_s = now_s
            if now_s - since_s > self._patience_s:
                raise DataFault(self._name_hanging(now, now_s - since_s))
        if isinstance(batch, Failure):
            fault = DataFault(batch.reason)
            fault.add_note(batch.trace)
            raise fault
        return batch

    def _check_alive(self, workers: list) -> None:
        """Raise `DataFault` naming a worker that has ended."""
        for worker in workers:
            if worker.exitcode is None:
                continue
            code = worker.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended ({code})"
            at = [
                self._where(place) for place in self._board.read() if place[PROCESS] == worker.pid
            ]
            raise DataFault(
                f"data worker {worker.pid} was {how}{''.join(at)}; memory or /dev/shm may be full: "
                "use fewer --num_workers"
            )

    def _where(self, place: tuple) -> str:
        return f" at {self._dataset.where(place[SAMPLE] - 1)}" if place[SAMPLE] else ""

    def _name_hanging(self, places: list[tuple], silent_s: float) -> str:
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
