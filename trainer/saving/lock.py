"""Owns the lock on what a run writes: two runs of one name in one folder would mix their files.

The operating system holds it for as long as the process lives, however that ends; over NFS the
server does, and lets go of a machine that is lost after its lease (some 90 s). The file beside the
weight only says who holds it.
"""

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.ranks.group import Ranks, is_main_process, warn

HELD = (BlockingIOError, PermissionError)  # how systems say that another process has it
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


def lock_path(written: Path) -> Path:
    """The lock that stands for a weight or state."""
    return written.with_name(f".{written.stem}.lock")


@contextlib.contextmanager
def run_lock(paths: Iterable[Path], ranks: Ranks) -> Iterator[None]:
    """Hold the locks of what a run writes, on the main process; every rank must come.

    Raises:
        ValueError: another run has one; on every rank.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if is_main_process():
            try:
                for path in dict.fromkeys(paths):
                    held.enter_context(_locked(path))
            except (ValueError, OSError) as error:
                problem = str(error)
        problem = ranks.from_first(problem)
        if problem:
            raise ValueError(problem)
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = _take(path)
    if file is None:
        yield
        return
    with file:
        file.truncate(0)
        file.write(json.dumps(_who_we_are()).encode())
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps what is open; it holds nothing
                path.unlink()


def _take(path: Path):
    """The open file, locked; None where the file system knows no locks, which is said."""
    while True:
        file = open(path, "a+b")  # noqa: SIM115, it is held by the caller
        try:
            _lock(file)
        except HELD:
            holder = _read(file)
            file.close()
            raise ValueError(
                f"another run writes {path.name[1:-5]} in {path.parent}: {holder}; wait for its "
                "end, or choose another --save_weight, or other folders by --save_dir and "
                "--checkpoint_dir"
            ) from None
        except OSError as error:
            file.close()
            warn(f"{path.parent} knows no locks ({error}): see that no other run writes there")
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its holder has just left and removed it


def _lock(file) -> None:
    if fcntl is None:
        file.seek(1 << 30)  # behind the text: on Windows nobody else may read what is locked
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:  # not flock: data workers that are forked would inherit that one, and outlive us with it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _who_we_are() -> dict:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
    }


def _read(file) -> str:
    file.seek(0)
    try:
        about = json.loads(file.read())
        return (
            f"process {about['process']} on {about['host']} since {about['since']} "
            f"({about['command']})"
        )
    except (ValueError, KeyError, TypeError):
        return "it has only just begun"
