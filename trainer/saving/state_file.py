"""Owns the files of a training state: their names, and how they are written, kept and read."""

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from model.machine.atomic_file import (
    atomic_write,
    real_place,
    remove_leftovers,
    staged_write,
    sync_folder,
)
from trainer.ranks.group import Logger

STATE_FORMAT = 2


def previous_path(path: Path) -> Path:
    """The path of the state before the newest one."""
    return path.with_name(path.name + ".previous")


def old_path(path: Path) -> Path:
    """The path to which the state of an earlier run moves, if this run does not continue it."""
    return path.with_name(path.name + ".old")


def save_state(
    path: Path, state: dict[str, Any], *, identity: dict[str, Any], is_first: bool = False
) -> None:
    """Save a training state. The state that stood at `path` is kept at `previous_path`, or, if this
    is the run's first save, at `old_path`.

    Args:
        identity: what must be equal when the state is resumed, by name.
    Raises:
        OSError: it could not be written; the files that stood there are untouched.
    """
    remove_leftovers(path)
    full = {"format": STATE_FORMAT, "identity": identity} | state
    with staged_write(path, lambda file: torch.save(full, file)):
        if path.is_file():
            _keep(path, old_path(path) if is_first else previous_path(path))
        elif is_first and previous_path(path).is_file():  # the newest was lost
            _keep(previous_path(path), old_path(path))
        if is_first:
            previous_path(path).unlink(missing_ok=True)


def _keep(path: Path, target: Path) -> None:
    """Make `target` a hard link to a file, replacing what was there. So `path` can then be replaced
    without a moment in which neither name has a whole state."""
    remove_leftovers(target)
    link = target.with_name(f".{target.name}.link.tmp")
    try:
        os.link(real_place(path), link)  # a link to a symlink would follow it to the next state
    except OSError:  # a file system without links: copy
        with open(path, "rb") as source:
            atomic_write(target, lambda file: shutil.copyfileobj(source, file))
        return
    os.replace(link, target)
    sync_folder(target.parent)


def load_state(
    path: Path, *, identity: dict[str, Any], former_identity: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Load the newest state that is whole; a damaged one is renamed to `*.damaged`.

    Args:
        identity: what must equal the saved identity, by name.
        former_identity: values by which an earlier version named the same things.
    Returns:
        The state, or None where there is none.
    Raises:
        ValueError: unreadable, of the original project, or its identity differs (says in what).
    """
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
    return _read(path, identity, former_identity or {})


def fault_of(path: Path) -> str | None:
    """What is wrong with a file as a zip archive, by its checksums; None if nothing is."""
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


def _read(path: Path, identity: dict[str, Any], former_identity: dict[str, Any]) -> dict[str, Any]:
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
            Logger(f"{path.name}: its {name} is as an earlier version computed it, from less of it")
        elif found != expected:
            found, expected = _unlike(found, expected)
            raise ValueError(
                f"{path} cannot be resumed: its {name} is {found!r}, this run's is {expected!r}; "
                "use the same, or drop --from_resume to start afresh"
            )
    return loaded


def _unlike(found: Any, expected: Any) -> tuple[Any, Any]:
    """Two parts of an identity; of two tables or lists only what differs, for a message."""
    if isinstance(found, dict) and isinstance(expected, dict):
        names = [n for n in found | expected if found.get(n) != expected.get(n)]
        return tuple({n: part.get(n, "default") for n in names} for part in (found, expected))
    if isinstance(found, list) and isinstance(expected, list):
        only = [[n for n in a if n not in b] for a, b in ((found, expected), (expected, found))]
        return tuple(f"with {len(n)} more, such as {n[0]}" if n else "without them" for n in only)
    return found, expected
