"""Owns what every evaluation task can do, and running one with one weight or with two.

This package knows neither `dataset/` nor `trainer/`: a task is given what it needs of them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from model.generation.engine import VLMEngine

T = TypeVar("T")
R = TypeVar("R")  # the result of one weight: complete, and the same on every rank


class Group(Protocol):
    """The ranks that share the work; `trainer.ranks.group.Ranks` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def batches(self, items: Iterable[T], size: int) -> Iterator[list[T]]:
        """This rank's batches of the items."""

    def collect(self, work: Callable[[], list[T]]) -> list[T]:
        """What `work` returns on each rank, in the order of the ranks, on all of them."""


class Task(Protocol[R]):
    """One kind of evaluation. It is made before any weight is loaded.

    Only reports are printed, never results, so a report read back from JSON prints the same.
    """

    def run(self, engine: VLMEngine) -> R:
        """Evaluate one weight."""

    def report(self, result: R) -> dict[str, Any]:
        """What the JSON holds of a result."""

    def print_report(self, report: dict[str, Any]) -> None: ...

    def compare(self, first: R, second: R) -> dict[str, Any]:
        """The second result minus the first.

        Raises:
            ValueError: there is nothing that both were evaluated on.
        """

    def print_difference(self, difference: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Output:
    """Where a report goes.

    Args:
        printing: a context in which to print.
        write: stores a report.
        is_main: this rank prints and writes.
    """

    printing: Callable[[], AbstractContextManager[None]]
    write: Callable[[dict[str, Any]], None]
    is_main: bool


def run_task(
    task: Task[R],
    load_first: Callable[[], VLMEngine],
    load_second: Callable[[], VLMEngine] | None = None,
    *,
    head: dict[str, Any],
    output: Output,
) -> None:
    """Evaluate one weight, or two and their difference; print the tables and write the report.

    Each weight is loaded when its turn comes, so that only one is in memory.

    Args:
        head: what the report says of the data.
    """
    engine = load_first()
    name = engine.path.name
    report = {"weight": str(engine.path)} | head
    first = task.run(engine)
    try:
        report |= _printed_report(task, first, output)
        if load_second:
            del engine
            engine = load_second()
            second = task.run(engine)
            weight = {"weight": str(engine.path)}
            report["compare"] = weight | _printed_report(task, second, output)
            difference = task.compare(first, second)
            report["compare"]["difference"] = difference
            if output.is_main:
                with output.printing():
                    print(f"\n{engine.path.name} minus {name}, paired:")
                    task.print_difference(difference)
    finally:  # if the second weight fails, the scores of the first are still written
        if output.is_main:
            output.write(report)


def _printed_report(task: Task[R], result: R, output: Output) -> dict[str, Any]:
    report = task.report(result)
    if output.is_main:
        with output.printing():
            task.print_report(report)
    return report


def progress(items: Iterable[T], group: Group, *, title: str | None = None) -> Iterable[T]:
    """The items, with a bar on the first rank where stderr is a terminal."""
    bar: Iterable[T] = tqdm(items, desc=title, disable=True if group.rank else None)
    return bar
