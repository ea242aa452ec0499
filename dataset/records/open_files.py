"""Owns how many data files a process has open: what was used longest ago is closed for others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar
from weakref import ref

try:
    import resource
except ImportError:  # Windows, where no such limit is near
    resource = None  # type: ignore[assignment]

MOST_OPEN = 256  # files of all sources together, in each process
DESCRIPTORS = 4  # allowed for each of them: a file takes up to two, and others need some too

Opened = TypeVar("Opened")


def most_open() -> int:
    """How many files may be open at once, by the system's limit on descriptors."""
    if resource is None:
        return MOST_OPEN
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_endless = soft == resource.RLIM_INFINITY
    return MOST_OPEN if is_endless else max(1, min(MOST_OPEN, soft // DESCRIPTORS))


class OpenedAtNeed(Generic[Opened]):
    """The reader of a file: opened when it is asked for, and again once others took its room.

    Args:
        open_it: opens the file; must be picklable. The file closes when what it gives is dropped.
    """

    _used: ClassVar[OrderedDict[int, ref[OpenedAtNeed]]] = OrderedDict()  # by id, of this process

    def __init__(self, open_it: Callable[[], Opened]):
        self._open_it = open_it
        self._opened: Opened | None = None

    def get(self) -> Opened:
        """The reader; raises what opening raises."""
        if self._opened is None:
            while len(self._used) >= most_open():
                _, found = self._used.popitem(last=False)
                if (oldest := found()) is not None:
                    oldest._opened = None
            self._opened = self._open_it()
            self._used[id(self)] = ref(self)
        self._used.move_to_end(id(self))
        return self._opened

    def __reduce__(self) -> tuple[type[OpenedAtNeed], tuple[Callable[[], Opened]]]:
        return type(self), (self._open_it,)
