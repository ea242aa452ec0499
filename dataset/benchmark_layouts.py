"""Measures how fast records are read in random order, in each layout.

    python -m dataset.benchmark_layouts my/train.jsonl --images_path my/images.zip
    python -m dataset.benchmark_layouts my/train.jsonl --images_path my/images --num_records 60000

The records are written as a folder, a zip, one Parquet file, Parquet shards, a tar and a folder of
`datasets`, and read in turn, so that other work on the machine falls on all alike. What is counted
is CPU time, of checking a record and reading its encoded pictures; nothing is decoded, and the
files lie in the system's cache. Nothing is kept.
"""

import argparse
import io
import json
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.converting.output import (
    PlainRecord,
    into_folder,
    json_lines,
    plain_record,
    write_parquet,
)
from dataset.converting.zip_writer import ZipWriter
from dataset.records.base import Records
from dataset.records.reader import open_records
from model.machine.terminal import one_line

NUM_SHARDS = 8
Place = tuple[Path, Path | None]  # of data and of images


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.benchmark_layouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data_path", type=Path, help="records / 数据")
    add("--images_path", type=Path, help="folder or zip of their images / 图像目录或 zip")
    add("--num_records", type=int, default=2000, help="the first ones (%(default)s) / 记录数")
    add("--num_read", type=int, default=3000, help="in a round (%(default)s) / 每轮读取数")
    add("--rounds", type=int, default=5, help="medians are over these (%(default)s) / 轮数")
    args = parser.parse_args(argv)
    for name in ("num_records", "num_read", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}")
    return args


def read_plain(records: Records, num: int) -> list[PlainRecord]:
    """The first records with their pictures; raises ValueError where one is broken."""
    found = []
    for index in range(min(num, len(records))):
        record = records[index]
        found.append(plain_record(record, [records.read_image(i) for i in record.images]))
    return found


def write_layouts(folder: Path, records: Sequence[PlainRecord]) -> dict[str, Place]:
    """Write the records in every layout; returns the places by name."""
    data, images, zipped = folder / "data.jsonl", folder / "images", folder / "images.zip"
    images.mkdir()
    data.write_bytes(b"".join(json_lines(records, into_folder(images))))
    with open(zipped, "wb") as file, ZipWriter(file) as archive:
        for _ in json_lines(records, archive.add):
            pass
    whole, shards = folder / "whole.parquet", folder / "shards"
    with open(whole, "wb") as file:
        write_parquet(file, records)
    shards.mkdir()
    size = -(-len(records) // NUM_SHARDS)
    for number, start in enumerate(range(0, len(records), size)):
        with open(shards / f"{number:05d}.parquet", "wb") as file:
            write_parquet(file, records[start : start + size])
    write_tar(folder / "data.tar", records)
    write_saved(folder / "saved", whole)
    return {
        "folder": (data, images),
        "zip": (data, zipped),
        "Parquet": (whole, None),
        "Parquet shards": (shards, None),
        "tar": (folder / "data.tar", None),
        "folder of datasets": (folder / "saved", None),
    }


def write_tar(path: Path, records: Sequence[PlainRecord]) -> None:
    """A tar as webdataset has it."""
    with tarfile.open(path, "w") as tar:
        for number, record in enumerate(records):
            text = json.dumps({"conversations": record.messages}, ensure_ascii=False).encode()
            files = [(f"{i}.jpg", image) for i, image in enumerate(record.images)]
            for suffix, content in (*files, ("json", text)):
                member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_saved(folder: Path, whole: Path) -> None:
    """A folder as `datasets.save_to_disk` writes it, with the rows of a Parquet file."""
    import pyarrow  # slow to import
    import pyarrow.parquet

    folder.mkdir()
    name = "data-00000-of-00001.arrow"
    file = pyarrow.parquet.ParquetFile(whole)
    with pyarrow.ipc.new_stream(str(folder / name), file.schema_arrow) as writer:
        for batch in file.iter_batches(1000):
            writer.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))


def read_s(records: Records, order: Sequence[int]) -> float:
    """Seconds of CPU that reading the records in this order takes."""
    started_s = time.process_time()
    for index in order:
        for image in records[index].images:
            records.read_image(image)
    return time.process_time() - started_s


def measure(places: dict[str, Place], args: argparse.Namespace) -> None:
    """Read all layouts in turn, and print a line of each."""
    opened = {name: open_records(*place) for name, place in places.items()}
    length = len(opened["folder"])
    taken: dict[str, list[float]] = {name: [] for name in opened}
    num_images = sum(len(opened["folder"][i].images) for i in range(length)) / length
    for number in range(args.rounds + 1):
        order = random.Random(number).choices(range(length), k=args.num_read)
        for name, records in opened.items():
            taken[name].append(read_s(records, order))
    print(f"{length:,} records with {num_images:.2f} images; a CPU second reads")
    for name, times in taken.items():
        rate = args.num_read / median(times[1:])  # the first round opens files
        print(f"  {name:18} {rate:>8,.0f} records, {rate * num_images:>8,.0f} images")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    try:
        source = read_plain(open_records(args.data_path, args.images_path), args.num_records)
        with tempfile.TemporaryDirectory() as folder:
            places = write_layouts(Path(folder), source)
            del source
            measure(places, args)
    except KeyboardInterrupt:
        print("stopped / 已中断", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
