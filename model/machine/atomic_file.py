"""Owns writing files so that nobody ever finds half of one: the old one stands until the new one
is whole."""

import contextlib
import glob
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

PRINTED_TO = (1, 2)  # descriptors of the standard output and of the errors


def atomic_write(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file so that it is either the old one or the new one, whole and on disk.

    A link stays: the file that it points to is replaced. What is no file but takes what is written
    (`/dev/stdout`, a pipe, a terminal) is written to as it stands, and never removed.

    Raises:
        OSError: naming the file; the half-written one is removed.
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
def staged_write(path: Path, write: Callable[[IO[bytes]], None]) -> Iterator[Path]:
    """Write a file beside its place, whole and on disk; it takes that place when the block ends.

    The place of a link is where the file is that it points to.

    Yields:
        Where it stands until then.
    Raises:
        OSError: naming the file; the half-written one is removed.
    """
    place = real_place(path)
    temporary = _staging_path(place)
    try:
        _refuse_what_is_no_file(path, place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        os.replace(temporary, place)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if temporary.is_file():
            temporary.unlink()
        if isinstance(error.__context__, KeyboardInterrupt):  # and Ctrl-C too
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
    """See to it that `atomic_write` can write here, before the work whose results it is to keep.

    Raises:
        ValueError: a folder, a place in a folder that is missing, or one that cannot be written.
    """
    place = real_place(path)
    try:
        if _is_stream(path):
            if not os.access(path, os.W_OK):
                raise OSError("Permission denied")
            return
        _refuse_what_is_no_file(path, place)
        if not place.parent.is_dir():
            raise OSError(f"there is no folder {place.parent}")
        probe = _staging_path(place)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{flag} {path} cannot be written ({reason}); name another file") from None


def real_place(path: Path) -> Path:
    """Where the file of this name stands: a link points to it."""
    return Path(os.path.realpath(path))


def _staging_path(place: Path) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")


def _refuse_what_is_no_file(path: Path, place: Path) -> None:
    if place.is_symlink():
        raise OSError("it is a link to itself")
    if path.is_dir():
        raise OSError("it is a folder")
    if path.exists() and not path.is_file():
        raise OSError("it is a device or a pipe, not a file")


def _is_stream(path: Path) -> bool:
    """Is it written to as it stands: a device, a pipe, or the file that this process prints to?"""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    is_file = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return not is_file or _descriptor_of(path) is not None


def _descriptor_of(path: Path) -> int | None:
    """The descriptor by which this process prints to the very same file."""
    for descriptor in PRINTED_TO:
        with contextlib.suppress(OSError):  # it is closed
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
    return None


def _open_stream(path: Path) -> IO[bytes]:
    """Opened anew, a file that is printed to would be emptied, and written over from its start."""
    descriptor = _descriptor_of(path)
    return open(path, "wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")


def sync_folder(folder: Path) -> None:
    """See to it that the names in a folder are on disk too."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove what writes of this file that were killed have left beside it."""
    place = real_place(path)
    for leftover in place.parent.glob(f".{glob.escape(place.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)
