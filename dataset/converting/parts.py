"""Owns the work of a conversion, cut into parts that are done in any order, and their joining.

A part is so many records, whatever the number of processes. Each becomes a file in a folder beside
the result, whole or not at all, so that a run which is killed goes on with the parts it lacks; when
all are there they are joined in their order. So the result has the same bytes however it was made.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dataset.converting.layouts import Layout
from dataset.converting.output import PlainRecord
from dataset.converting.pictures import OpenPicture, Resizing
from dataset.examining.faults import Fault, fault_of
from dataset.examining.sources import FaultyRecordError

# What the machine lacks, now, whatever the data are.
NOT_OF_THE_DATA = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}

PART_RECORDS = 128  # few enough that the pictures of a part fit in memory
VERSION = 1  # of the parts' files
SETTINGS, JOINING = "settings.json", "joining"  # beside the parts
OWN_NAME = rf"(?:\d{{6,}}\.arrow|{re.escape(SETTINGS)}|{JOINING})"
OWN_FILE = re.compile(rf"{OWN_NAME}|\.{OWN_NAME}\.[0-9a-f]+\.tmp")  # or half of one, after a kill
AtomicWrite = Callable[[Path, Callable[[IO[bytes]], object]], None]


@dataclass(frozen=True)
class Converter:
    """Makes parts; it can be sent to another process.

    Args:
        folder: takes the parts.
        atomic_write: writes a file whole or not at all.
    """

    layout: Layout
    resizing: Resizing
    open_picture: OpenPicture
    atomic_write: AtomicWrite
    folder: Path

    @property
    def num_parts(self) -> int:
        return -(-len(self.layout) // PART_RECORDS)

    def path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.arrow"

    def missing(self) -> list[int]:
        """The parts that are not there yet."""
        return [part for part in range(self.num_parts) if not self.path(part).exists()]

    def num_records(self, part: int) -> int:
        return min(PART_RECORDS, len(self.layout) - part * PART_RECORDS)

    def make(self, part: int) -> int:
        """Convert a part; returns how many records of the source it is."""
        import pyarrow  # slow to import

        first, num = part * PART_RECORDS, self.num_records(part)
        done: dict[bytes, bytes] = {}  # neighbouring records often have the same picture
        rows = [self._row(index, done) for index in range(first, first + num)]
        schema = pyarrow.schema(
            {"record": pyarrow.string(), "images": pyarrow.list_(pyarrow.large_binary())}
        )
        table = pyarrow.Table.from_pylist(rows, schema=schema)

        def write(file: IO[bytes]) -> None:
            with pyarrow.ipc.new_file(file, schema) as writer:
                writer.write_table(table)

        self.atomic_write(self.path(part), write)
        return num

    def _row(self, index: int, done: dict[bytes, bytes]) -> dict[str, Any]:
        try:
            record = self.layout.record(index)
            for image in record.images:
                if image not in done:
                    done[image] = self.resizing.apply(image, self.open_picture)
            images = [done[image] for image in record.images]
        except FaultyRecordError as error:
            return _packed({"fault": asdict(error.fault)}, [])
        except MemoryError:
            raise  # not the record's fault
        except Exception as error:  # on damaged data the libraries raise almost anything
            reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
            if isinstance(reason, OSError) and reason.errno in NOT_OF_THE_DATA:
                raise
            fault = fault_of(error, where=self.layout.where(index))
            return _packed({"fault": asdict(fault)}, [])
        return _packed({"messages": record.messages, "types": record.types}, images)

    def read(self) -> Iterator[PlainRecord | Fault]:
        """All records and faults, in the order of the source."""
        import pyarrow

        yield from self.layout.faults
        for part in range(self.num_parts):
            with pyarrow.OSFile(str(self.path(part))) as file:
                for row in pyarrow.ipc.open_file(file).read_all().to_pylist():
                    fields = json.loads(row["record"])
                    if "fault" in fields:
                        yield Fault(**fields["fault"])
                    else:
                        types = tuple(fields["types"])
                        yield PlainRecord(fields["messages"], row["images"], types)


def _packed(fields: dict[str, Any], images: list[bytes]) -> dict[str, Any]:
    """A row of a part; ASCII, since texts may hold halves of characters."""
    return {"record": json.dumps(fields), "images": images}


def is_made_for(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds parts that were made with these settings."""
    about = folder / SETTINGS
    return about.is_file() and about.read_bytes() == _settings_file(settings)


def _settings_file(settings: dict[str, Any]) -> bytes:
    return json.dumps({"version": VERSION, **settings}, sort_keys=True, indent=1).encode()


def prepare_folder(folder: Path, settings: dict[str, Any], atomic_write: AtomicWrite) -> bool:
    """Make the folder of parts; those made with other settings or of another source are removed.

    Returns:
        Whether there are parts to go on with.
    """
    if is_made_for(folder, settings):
        return any(folder.glob("*.arrow"))
    if folder.exists():
        remove_parts(folder)
    folder.mkdir(exist_ok=True)
    atomic_write(folder / SETTINGS, lambda file: file.write(_settings_file(settings)))
    return False


def begin_joining(folder: Path, places: Sequence[Path], atomic_write: AtomicWrite) -> None:
    """Note that the result is being written: from here on what stands there is this run's own."""
    atomic_write(folder / JOINING, lambda file: file.write(_names(places)))


def is_joining(folder: Path, places: Sequence[Path]) -> bool:
    """Whether a run with the folder's settings has begun to write its result to these places."""
    mark = folder / JOINING
    return mark.is_file() and mark.read_bytes() == _names(places)


def _names(places: Sequence[Path]) -> bytes:
    return os.fsencode("\0".join(path.name for path in places))


def remove_parts(folder: Path) -> None:
    """Remove what a conversion writes into its folder, and the folder unless it holds more."""
    for path in list(folder.iterdir()):
        if OWN_FILE.fullmatch(path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # something else is in it
        folder.rmdir()


def make_parts(converter: Converter, *, num_processes: int) -> Iterator[int]:
    """Make the parts that are missing, in any order; yields the number of records of each.

    Raises:
        ValueError: a process died.
    """
    missing = converter.missing()
    if num_processes == 1 or len(missing) <= 1:
        yield from map(converter.make, missing)
        return
    context = multiprocessing.get_context("spawn")
    num_processes = min(num_processes, len(missing))
    with ProcessPoolExecutor(num_processes, context, _prepare_worker, (converter,)) as pool:
        try:
            for job in as_completed([pool.submit(_make_part, part) for part in missing]):
                yield job.result()
        except BrokenProcessPool:
            raise ValueError(
                "a process of the conversion died, perhaps for want of memory; the same command "
                "goes on from there, with fewer --num_processes if need be"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_worker_converter: Converter | None = None  # of a worker process, set once when it starts


def _prepare_worker(converter: Converter) -> None:
    """Keep the converter, leave Ctrl-C to the parent, and end when that ends."""
    global _worker_converter
    _worker_converter = converter
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _make_part(part: int) -> int:
    assert _worker_converter is not None
    return _worker_converter.make(part)


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder of parts, where the system has locks.

    Raises:
        ValueError: another run has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = folder.with_name(f"{folder.name}.lock")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run makes {folder.name}; wait for it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
