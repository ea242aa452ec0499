"""Owns writing a state in the background: from a copy in host memory, if there is room for one."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.ranks.group import warn

SPARE_SHARE = 0.5  # of the free memory, which a copy may take


class Snapshot:
    """A copy of a state in host memory; the next copy reuses its buffers."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    @property
    def is_used(self) -> bool:
        return bool(self._buffers)

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with every tensor copied; tensors that share memory still do."""
        former, self._buffers = iter(self._buffers), []
        copies: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

        def of(value: Any) -> Any:
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

        copied: dict[str, Any] = of(state)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies from a GPU are asynchronous
        return copied

    def _copy_tensor(self, tensor: Tensor, buffer: Tensor | None) -> Tensor:
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._buffers.append(buffer)
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


def state_bytes(value: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(state_bytes, value.values()))
    return sum(map(state_bytes, value)) if isinstance(value, list | tuple) else 0


def spare_bytes() -> int | None:
    """Bytes that a copy may take, of the machine's or container's free memory; None if unknown."""
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
    """Does one write at a time in a thread, and keeps the error of the last one."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.failure: Exception | None = None

    def run(self, write: Callable[[], None], *, is_background: bool) -> None:
        """Do a write when the one before it is done; return at once if `is_background`."""
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
        except Exception as error:  # a warning now; the next save and the end look at `failure`
            self.failure = error
            warn(f"saving failed: {error}; training goes on, and the next save tries again")

    def wait(self) -> None:
        """Wait until no write is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
