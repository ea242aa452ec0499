"""Offers the record of what a pretend GPU did: copies between host and device, and operations."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from support.pretend_gpu import Driver
from support.scripts import ROOT
from torch import Tensor

ERROR = 2  # of `torch.cuda.set_sync_debug_mode`


@dataclass(frozen=True)
class Copy:
    """One copy between host and device.

    Args:
        line: of this repository, such as "trainer/metrics.py:70 read".
        waits: the host stands still until the copy is done.
    """

    what: str
    line: str
    waits: bool = True


@dataclass
class Traffic:
    """All copies since the start, or since `clear`."""

    to_host: list[Copy] = field(default_factory=list)
    to_device: list[Copy] = field(default_factory=list)

    def clear(self) -> None:
        self.to_host.clear()
        self.to_device.clear()


@dataclass
class World:
    """The GPUs, what was copied and computed there, and where C++ code makes new tensors now.

    `kernels` counts operations by name and GPU, such as `("aten::mm", 0)`.
    """

    driver: Driver
    traffic: Traffic = field(default_factory=Traffic)
    kernels: Counter = field(default_factory=Counter)
    place: torch.device | None = None

    def device(self, wish) -> torch.device:
        """A wish such as "cuda" or 1 as PyTorch understands it, with an index."""
        device = torch.device("cuda", wish) if isinstance(wish, int) else torch.device(wish)
        if device.type != "cuda":
            return device
        if device.index is None:
            return torch.device("cuda", self.driver.current)
        return torch.device("cuda", self.driver.check(device.index))

    @contextmanager
    def at(self, place: torch.device | None) -> Iterator[None]:
        former, self.place = self.place, place
        try:
            yield
        finally:
            self.place = former


_WORLDS: list[World] = []  # the last one is that of the test that runs


def world() -> World:
    """That of the test that runs."""
    return _WORLDS[-1]


@contextmanager
def entered(new: World) -> Iterator[World]:
    """Make a world the one of the test that runs, until the block ends."""
    _WORLDS.append(new)
    try:
        yield new
    finally:
        _WORLDS.pop()


def calling_line() -> str:
    """The innermost line of the repository, this folder apart, that the program stands in."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT)) and "/support/" not in name and "/.venv/" not in name:
            where = name.removeprefix(f"{ROOT}/")
            return f"{where}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def note_to_host(what: str, *, waits: bool = True) -> None:
    """Note a copy to the host; raises where the program said that nothing may wait."""
    if waits and world().driver.sync_debug_mode == ERROR:
        raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
    world().traffic.to_host.append(Copy(what, calling_line(), waits))


def note_to_device(what: str, source: Tensor | None, *, non_blocking: bool) -> None:
    is_pinned = source is not None and getattr(source, "is_pretend_pinned", False)
    waits = not (is_pinned and non_blocking)
    world().traffic.to_device.append(Copy(what, calling_line(), waits))
