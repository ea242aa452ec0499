"""Owns writing the usable records of a data set."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from tqdm import tqdm

from dataset.converting.output import PlainRecord, json_lines, plain_record, write_parquet
from dataset.converting.zip_writer import ZipWriter
from dataset.examining.survey import Examined

# Writes a file whole or not at all: its path, and what writes its content.
AtomicWrite = Callable[[Path, Callable[[IO[bytes]], object]], None]


def clean_images_path(path: Path) -> Path:
    """The zip of the pictures beside clean JSON lines."""
    return path.with_name(f"{path.stem}_images.zip")


def clean_records(found: Examined) -> Iterator[PlainRecord]:
    """The usable records, read again."""
    sources = found.sources
    usable = (i for i in range(len(sources)) if not found.is_faulty[i])
    total = len(sources) - sum(found.is_faulty)
    for index in tqdm(usable, total=total, desc="writing", unit=" records", disable=None):
        record = sources.record(index)
        images = [sources.read_image(index, image) for image in record.images]
        yield plain_record(record, images)


def write_clean(path: Path, found: Examined, atomic_write: AtomicWrite) -> None:
    """Write the usable records.

    Args:
        path: ends with .parquet or .jsonl; beside the latter a zip takes the pictures.
    Raises:
        ValueError: there are none. OSError: it cannot be written.
    """
    if all(found.is_faulty):
        raise ValueError("there is no usable record to write")
    if path.suffix == ".parquet":
        atomic_write(path, lambda file: write_parquet(file, clean_records(found)))
        return
    with tempfile.TemporaryFile() as lines:

        def write_images(file: IO[bytes]) -> None:
            with ZipWriter(file) as archive:
                lines.writelines(json_lines(clean_records(found), archive.add))

        atomic_write(clean_images_path(path), write_images)
        lines.seek(0)
        atomic_write(path, lambda file: shutil.copyfileobj(lines, file))
