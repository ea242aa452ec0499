"""Owns writing a state while training goes on: a copy in memory, where there is room."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainer.ranks.group import warn

SPARE_SHARE = 0.5  # a copy may take that much of the memory that is free


class Snapshot:
    """A copy of a state in host memory, whose buffers the next copy uses again."""

    def __init__(self):
        self._buffers: list[Tensor] = []

    @property
    def is_used(self) -> bool:
        return bool(self._buffers)

    def copy(self, state: dict) -> dict:
        """The state with every tensor copied; tensors that share memory still do."""
        former, self._buffers = iter(self._buffers), []
        copies: dict[tuple, Tensor] = {}

        def of(value):
            if isinstance(value, dict):
                return {key: of(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(of(item) for item in value)
            if not isinstance(value, Tensor):
                return value
            key = (value.data_ptr(), value.shape, value.dtype)
            if value.numel() == 0 or key not in copies:
                copies[key] = self._copy_tensor(value.detach(), next(former, None))
            return copies[key]

        copied = of(state)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies from a GPU were only begun
        return copied

    def _copy_tensor(self, tensor: Tensor, buffer: Tensor | None) -> Tensor:
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._buffers.append(buffer)
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


def state_bytes(value) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(state_bytes, value.values()))
    return sum(map(state_bytes, value)) if isinstance(value, list | tuple) else 0


def spare_bytes() -> int | None:
    """Memory of this machine, or container, that a copy may take; None where it is not known."""
    try:
        free = _fields("/proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        free = min(free, limit - used + _fields(group / "memory.stat")["inactive_file"])
    except (OSError, ValueError, KeyError):  # not in a container, or without a limit
        pass
    return int(free * SPARE_SHARE)


def _fields(path: Path | str) -> dict[str, int]:
    """A file of lines such as `name 123`."""
    lines = [line.split() for line in Path(path).read_text(encoding="ascii").splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


class BackgroundWriter:
    """Does one write at a time behind training's back, and keeps the last one's failure."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self.failure: Exception | None = None

    def run(self, write: Callable[[], None], *, is_background: bool) -> None:
        """Do a write, once the one before it is done."""
        self.wait()
        if not is_background:
            self._try(write)
            return
        self._thread = threading.Thread(target=self._try, args=(write,), name="state", daemon=True)
        self._thread.start()

    def _try(self, write: Callable[[], None]) -> None:
        self.failure = None
        try:
            write()
        except Exception as error:  # told now, and again by whoever asks
            self.failure = error
            warn(f"saving failed: {error}; training goes on, and the next save tries again")

    def wait(self) -> None:
        """Until no write is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
