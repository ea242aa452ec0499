"""Owns the folder of fetched shards: of bounded size, shared by all processes of a machine.

Each entry is a folder `KEY/` with one file in it. An entry is made in a folder `part-KEY-BYTES-*`,
whose name reserves its room, and renamed once it is whole; whoever makes it holds a lock, so what
a killed process has left is known by its free lock. The entries used longest ago make room.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset.records.streams.remote import StreamError

try:
    import fcntl
except ImportError:  # Windows: two processes may then fetch the same
    fcntl = None  # type: ignore[assignment]

NUM_LOCKS = 256
BLOCK_BYTES = 1 << 12  # of which a file system gives whole ones
PART, TRASH, LOCKS, FACTS = "part-", "trash-", "locks", "facts"
OWN_ENTRY = re.compile(r"[0-9a-f]{32}")
OWN_PART = re.compile(rf"{PART}([0-9a-f]{{32}})-(\d+)-")
OWN_TRASH = re.compile(rf"{TRASH}[0-9a-f]{{32}}-")


class ShardCache:
    """Files by key.

    Args:
        folder: is made.
        max_bytes: of all entries together.
    """

    def __init__(self, folder: Path, *, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        try:
            for name in (LOCKS, FACTS):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StreamError(
                f"{folder}: shards cannot be kept there ({error.strerror}); name another folder by "
                "--stream_cache_dir"
            ) from error

    def find(self, key: str, name: str) -> Path | None:
        """The file of an entry, if it is here."""
        path = self.folder / key / name
        return path if path.exists() else None

    def use(self, key: str) -> None:
        """Note that an entry is in use, so that others make room before it does."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / key)

    def keep(self, key: str, name: str, *, num_bytes: int, fetch: Callable[[Path], None]) -> Path:
        """The file of an entry; made by `fetch`, which writes it, unless it is here.

        Args:
            num_bytes: the room that it needs.
        Raises:
            StreamError: it cannot be had, or does not fit.
        """
        with self._locked(lock_of(key)):
            found = self.find(key, name)
            if found is None:
                self._make(key, name, num_bytes, fetch)
            self.use(key)
        return self.folder / key / name

    def _make(self, key: str, name: str, num_bytes: int, fetch: Callable[[Path], None]) -> None:
        part = self._reserve(key, num_bytes)
        try:
            fetch(part / name)
            with self._locked("room"), contextlib.suppress(OSError):
                os.rename(part, self.folder / key)  # fails where another was first, without locks
            if self.find(key, name) is None:
                raise StreamError(f"{self.folder / key} cannot be written")
        except OSError as error:
            raise StreamError(
                f"{self.folder}: {name} cannot be kept there ({error.strerror or error}); make "
                "room, or name another folder by --stream_cache_dir"
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _reserve(self, key: str, num_bytes: int) -> Path:
        """A new folder to fetch into, and the room for it."""
        num_bytes = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        with self._locked("room"):
            self._drop_leftovers(held=lock_of(key))
            entries = sorted(self._entries(), key=lambda entry: entry[0])
            total = sum(size for _, size, _ in entries) + num_bytes
            for _, size, path in entries:
                if total <= self.max_bytes:
                    break
                if path is not None:
                    self._drop(path)
                    total -= size
            return Path(tempfile.mkdtemp(dir=self.folder, prefix=f"{PART}{key}-{num_bytes}-"))

    def _entries(self) -> Iterator[tuple[float, int, Path | None]]:
        """When each entry was used last, its size and its folder; None for one being fetched."""
        for entry in os.scandir(self.folder):
            part = OWN_PART.match(entry.name)
            with contextlib.suppress(FileNotFoundError):  # given up meanwhile
                if part:
                    yield entry.stat().st_mtime, int(part[2]), None
                elif OWN_ENTRY.fullmatch(entry.name):  # nothing else in the folder is touched
                    path = Path(entry.path)
                    yield entry.stat().st_mtime, size_on_disk(path), path

    def _drop_leftovers(self, *, held: str) -> None:
        """Delete what processes that were killed have left half done."""
        for path in self.folder.iterdir():
            part = OWN_PART.match(path.name)
            if OWN_TRASH.match(path.name):
                shutil.rmtree(path, ignore_errors=True)
            elif part and lock_of(part[1]) != held:  # its own is held by this very thread
                with self._locked(lock_of(part[1]), waits=False) as is_free:
                    if is_free:
                        shutil.rmtree(path, ignore_errors=True)

    def _drop(self, path: Path) -> None:
        trash = path.with_name(f"{TRASH}{path.name}-{os.getpid()}")
        with contextlib.suppress(OSError):
            os.rename(path, trash)  # at once, so that nobody finds half of it
        shutil.rmtree(trash, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, name: str, *, waits: bool = True) -> Iterator[bool]:
        """A lock that ends with the process; yields whether it was had."""
        with open(self.folder / LOCKS / name, "ab") as file:
            if fcntl is None:
                yield waits
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:  # a data worker that was forked meanwhile has the file open too
                fcntl.flock(file, fcntl.LOCK_UN)


def lock_of(key: str) -> str:
    """Keys share a bounded number of locks."""
    return str(int(key[:8], 16) % NUM_LOCKS)


def size_on_disk(folder: Path) -> int:
    """Bytes that the files of an entry take; holes in them take none."""
    sizes = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            about = path.stat()
            blocks: int | None = getattr(about, "st_blocks", None)
            sizes.append(about.st_size if blocks is None else blocks * 512)
    return sum(sizes)
