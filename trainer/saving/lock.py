"""Owns the lock on what a run writes: two runs of one name in one folder would mix their files.

It is a lock of the operating system on a file beside the weight, released when the process ends in
any way. Over NFS the server holds it, and releases that of a lost machine after its lease (some
90 s). The file's content only names the holder.
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
from typing import IO, Any

from trainer.ranks.group import Ranks, is_main_process, warn

LEFT_BEHIND_S = 10  # how long the data workers of a run that was killed may share its lock
HELD = (BlockingIOError, PermissionError)  # raised where another process has the lock
if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def lock_path(written: Path) -> Path:
    """The lock file of a weight or state."""
    return written.with_name(f".{written.stem}.lock")


@contextlib.contextmanager
def run_lock(paths: Iterable[Path], ranks: Ranks) -> Iterator[None]:
    """Hold the locks of what a run writes, on the main process; every rank must call it.

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
        path.write_text(json.dumps(_who_we_are()), encoding="utf-8")
        try:
            yield
        finally:
            with contextlib.suppress(
                OSError
            ):  # Windows keeps open files; the file alone locks nothing
                path.unlink()


def _take(path: Path) -> IO[bytes] | None:
    """The open file, locked; None, with a warning, where the file system has no locks."""
    deadline = time.monotonic() + LEFT_BEHIND_S
    while True:
        path.touch()
        # Read only: a file system with a file open for writing could not be made read-only.
        file = open(path, "rb")  # noqa: SIM115, the caller closes it
        try:
            _lock(file)
        except HELD:
            holder, is_dead = _read(file), _is_dead(file)
            file.close()
            if is_dead and time.monotonic() < deadline:  # its data workers are about to end
                time.sleep(0.1)
                continue
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
        file.close()  # the former holder has just removed this file: open the new one


def _lock(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        file.seek(1 << 30)  # behind the text: on Windows nobody else may read locked bytes
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:  # forked data workers share it: they end with this process, however it ends
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _who_we_are() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
    }


def _is_dead(file: IO[bytes]) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    file.seek(0)
    try:
        about = json.loads(file.read())
        if sys.platform == "win32" or about["host"] != socket.gethostname():
            return False
        os.kill(about["process"], 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError):
        return False
    return False


def _read(file: IO[bytes]) -> str:
    """The holder, as the file names it."""
    file.seek(0)
    try:
        about = json.loads(file.read())
        return (
            f"process {about['process']} on {about['host']} since {about['since']} "
            f"({about['command']})"
        )
    except (ValueError, KeyError, TypeError):
        return "it has only just begun"
