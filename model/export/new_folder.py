"""Owns that an export appears whole, in a folder of its own, or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from model.machine.atomic_file import real_place, sync_folder

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_WORDS = ("No space left", "quota exceeded", "File too large")  # of what Rust raises


def check_new_folder(folder: Path) -> None:
    """Check that an export may go here, before the work whose result goes there.

    Raises:
        ValueError: something is there already, or nothing can be written there.
    """
    place = real_place(folder)
    if os.path.lexists(place) and not place.is_dir():
        raise ValueError(f"--out {folder} is a file; name a new folder")
    if place.is_dir() and any(place.iterdir()):
        raise ValueError(f"--out {folder} is not empty; name a new folder, or remove it first")
    parent = next(p for p in place.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out {folder}: nothing can be written in {parent}; name another folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name only where the block ends well.

    It lies in `.NAME.part` beside it; what a killed run left of that is cleared.

    Raises:
        ValueError: as `check_new_folder`.
        OSError: the disk is full. As after any other error, nothing is left.
    """
    check_new_folder(folder)
    place = real_place(folder)
    part = place.with_name(f".{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        _sync(part)
        if place.is_dir():
            place.rmdir()
        part.rename(place)
    except (OSError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        raise OSError(
            f"--out {folder}: the disk is full; free some space or name another folder; nothing "
            "was left there"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(place.parent)


def _is_full_disk(error: Exception) -> bool:
    number = error.errno if isinstance(error, OSError) else None
    return number in FULL_DISK or any(words in str(error) for words in FULL_DISK_WORDS)


def _sync(folder: Path) -> None:
    """Bring all files to disk, so that a crash after the renaming finds them whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)
