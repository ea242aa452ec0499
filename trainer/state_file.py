"""Owns the files of a training state: how it is copied, written behind training's back, and read.

`X_resume.pth` is the newest state and `X_resume.pth.previous` the one before it, which is read
where the newest is missing or damaged.
"""

import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.machine.atomic_file import (
    atomic_write,
    real_place,
    remove_leftovers,
    staged_write,
    sync_folder,
)
from trainer.trainer_utils import Logger, warn

STATE_FORMAT = 2
SPARE_SHARE = 0.5  # a copy may take that much of the memory that is free


def previous_path(path: Path) -> Path:
    """Where the state before the newest one stands."""
    return path.with_name(path.name + ".previous")


def old_path(path: Path) -> Path:
    """Where the state of an earlier run goes that is not continued."""
    return path.with_name(path.name + ".old")


def vlm_checkpoint(
    path: Path,
    state: dict | None = None,
    *,
    identity: dict,
    former_identity: dict | None = None,
    is_first: bool = False,
) -> dict | None:
    """Save a training state, or load one with `state=None`.

    Saving keeps what stood there: as the previous state, or as an earlier run's if `is_first`.

    Args:
        identity: what must not change between saving and resuming, by name.
        former_identity: values that a state of an earlier version may have in place of those.
    Returns:
        The loaded state, or None where there is none.
    Raises:
        ValueError: unreadable, the original project's, or of another identity (which is named).
        OSError: it could not be written; the states that stood there are untouched.
    """
    if state is None:
        return _load(path, identity, former_identity or {})
    remove_leftovers(path)
    full = {"format": STATE_FORMAT, "identity": identity} | state
    with staged_write(path, lambda file: torch.save(full, file)):
        if path.is_file():
            _keep(path, old_path(path) if is_first else previous_path(path))
        elif is_first and previous_path(path).is_file():  # the newest was lost
            _keep(previous_path(path), old_path(path))
        if is_first:
            previous_path(path).unlink(missing_ok=True)
    return None


def _keep(path: Path, target: Path) -> None:
    """Give a file a second name, in place of what had that name, so that it can be replaced
    without a moment in which neither stands."""
    remove_leftovers(target)
    link = target.with_name(f".{target.name}.link.tmp")
    try:
        os.link(real_place(path), link)  # of a link itself it would name what comes next
    except OSError:  # a file system without links: copy
        with open(path, "rb") as source:
            atomic_write(target, lambda file: shutil.copyfileobj(source, file))
        return
    os.replace(link, target)
    sync_folder(target.parent)


def _load(path: Path, identity: dict, former_identity: dict) -> dict | None:
    """The newest state that is whole; a damaged one is set aside."""
    previous = previous_path(path)
    if not path.is_file() and not previous.is_file():
        return None
    fault = fault_of(path)
    if fault:
        if fault_of(previous):
            raise ValueError(
                f"{path} is not a readable training state ({fault}), and there is no whole one "
                "before it; delete it to start afresh"
            )
        if path.is_file():
            os.replace(path, path.with_name(path.name + ".damaged"))
        Logger(f"{path} {fault}: going on from the state before it, {previous.name}")
        path = previous
    return _read(path, identity, former_identity)


def fault_of(path: Path) -> str | None:
    """What is wrong with a file as an archive: every byte is compared with its checksum."""
    if not path.is_file():
        return "is missing"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        return f"is damaged ({damaged})" if damaged else None
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # zipfile raises almost anything on damaged data
        return f"is damaged ({error or type(error).__name__})"


def _read(path: Path, identity: dict, former_identity: dict) -> dict:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # the unpickler raises almost anything on what it does not know
        raise ValueError(
            f"{path} is not a readable training state ({type(error).__name__}); "
            "delete it to start afresh"
        ) from error
    if not isinstance(loaded, dict) or loaded.get("format") != STATE_FORMAT:
        raise ValueError(
            f"{path} was not written by this version (the original project's states cannot be "
            "resumed); delete it and start from its weight by --from_weight"
        )
    for name, expected in identity.items():
        found = loaded["identity"].get(name)
        if found != expected and found is not None and found == former_identity.get(name):
            Logger(f"{path.name}: its {name} was told by an earlier version, which looked less far")
        elif found != expected:
            raise ValueError(
                f"{path} cannot be resumed: its {name} is {found!r}, this run's is {expected!r}; "
                "use the same, or drop --from_resume to start afresh"
            )
    return loaded


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
