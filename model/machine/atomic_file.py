"""Owns atomic writing: a file is replaced only once the new one is complete and on disk."""

import contextlib
import glob
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

STANDARD_STREAMS = (1, 2)  # descriptors of stdout and stderr


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that after a crash it is either the old one or the complete new one.

    A symbolic link is kept: the file that it points to is replaced. A pipe or a device
    (`/dev/stdout`, a terminal) is written to directly, and never removed.

    Args:
        write: writes the content to the open file; what it returns is ignored.
    Raises:
        OSError: naming the file; an incomplete new file is removed.
    """
    if not _is_stream(path):
        with staged_write(path, write):
            return
    try:
        with _open_stream(path) as stream:
            write(stream)
    except OSError as error:
        raise OSError(f"could not write to {path} ({error})") from error


@contextlib.contextmanager
def staged_write(path: Path, write: Callable[[IO[bytes]], object]) -> Iterator[Path]:
    """`atomic_write` in two steps, with the caller's block between them.

    1. Write the content to a temporary file in the same folder, and sync it to disk.
    2. When the block ends without an error, rename that file to its final name.

    Yields:
        Path of the temporary file.
    Raises:
        OSError: naming the file; the temporary file is removed.
    """
    place = real_place(path)
    temporary = _staging_path(place)
    try:
        _check_regular_file(path, place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        os.replace(temporary, place)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        if temporary.is_file():
            temporary.unlink()
        if isinstance(error.__context__, KeyboardInterrupt):  # ... and for Ctrl-C
            raise KeyboardInterrupt from error
        raise OSError(
            f"could not write {path} ({error}); what stood there before is untouched; free some "
            "space or choose another folder"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(place.parent)


def check_place(path: Path, *, flag: str) -> None:
    """Check that `atomic_write` can write here, before the work whose results go there.

    Raises:
        ValueError: it is a folder, its folder is missing, or it cannot be written.
    """
    place = real_place(path)
    try:
        if _is_stream(path):
            if not os.access(path, os.W_OK):
                raise OSError("Permission denied")
            return
        _check_regular_file(path, place)
        if not place.parent.is_dir():
            raise OSError(f"there is no folder {place.parent}")
        probe = _staging_path(place)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{flag} {path} cannot be written ({reason}); name another file") from None


def real_place(path: Path) -> Path:
    """The file itself, symbolic links followed."""
    return Path(os.path.realpath(path))


def _staging_path(place: Path) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")


def _check_regular_file(path: Path, place: Path) -> None:
    if place.is_symlink():
        raise OSError("it is a link to itself")
    if path.is_dir():
        raise OSError("it is a folder")
    if path.exists() and not path.is_file():
        raise OSError("it is a device or a pipe, not a file")


def _is_stream(path: Path) -> bool:
    """Whether it is written to directly: a device, a pipe, or the file that stdout goes to."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    is_file_or_folder = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return not is_file_or_folder or _descriptor_of(path) is not None


def _descriptor_of(path: Path) -> int | None:
    """The descriptor of stdout or stderr where it is this very file, else None."""
    for descriptor in STANDARD_STREAMS:
        with contextlib.suppress(OSError):  # it is closed
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
    return None


def _open_stream(path: Path) -> IO[bytes]:
    """Open for writing; stdout is duplicated, for opening its file by name would truncate it."""
    descriptor = _descriptor_of(path)
    return open(path, "wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that new names in it survive a crash too."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed writes of this file have left beside it."""
    place = real_place(path)
    for leftover in place.parent.glob(f".{glob.escape(place.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)
