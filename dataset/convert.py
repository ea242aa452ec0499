"""Converts other projects' data to records: JSON lines with a zip or folder of images, or Parquet.

    python -m dataset.convert llava.json --images_path my/images --to my/train.jsonl
    python -m dataset.convert captions_train2014.json --images_path train2014 --to my/coco.parquet
    python -m dataset.convert questions.json --annotations answers.json --images_path val2014 \\
        --to my/vqa.jsonl --images folder
    python -m dataset.convert table.csv my/folder shards/*.parquet --to my/all.parquet \\
        --max_side 512 --jpeg_quality 85

Sources may be LLaVA's or ShareGPT's JSON, COCO captions, VQA v2, a CSV with columns image and
caption, a folder of pictures with .txt files beside them, Parquet as FineVision and the Cauldron
have it, and this project's own files. A run that is stopped, even by `kill -9`, goes on with the
same command, and the result has the same bytes. Records that cannot be used are left out and
listed. The exit status is 0 if there are none, 1 if there are or the work failed, 2 if the command
itself is wrong, and 130 after Ctrl-C.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from dataset.converting.opening import LAYOUTS, Source, open_sources, resolve
from dataset.converting.output import (
    PlainRecord,
    StorePicture,
    into_folder,
    json_lines,
    write_parquet,
)
from dataset.converting.parts import (
    Converter,
    begin_joining,
    is_joining,
    is_made_for,
    make_parts,
    only_run,
    prepare_folder,
    remove_parts,
)
from dataset.converting.pictures import DEFAULT_QUALITY, Resizing
from dataset.converting.zip_writer import ZipWriter
from dataset.examining.faults import Fault, FaultBook
from dataset.examining.sources import FIX_FLAG
from dataset.examining.text_report import fault_lines
from dataset.fetching.whole_folder import whole_folder

DONE, FAULTY, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MiB as RGB
PROMPT = "Describe the picture."
NUM_FAULTS = 10  # of a kind that are printed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    layouts = "; ".join(f"{name}: {what}" for name, what in LAYOUTS.items())
    add("paths", nargs="+", type=Path, metavar="SOURCE", help="files, folders or patterns / 来源")
    add("--to", type=Path, required=True, help="the result: .jsonl or .parquet / 输出文件")
    add("--layout", choices=("auto", *LAYOUTS), default="auto", help=f"{layouts} / 来源格式")
    add(
        "--images_path",
        type=Path,
        help="folder or zip of the images (default: the source's own folder) / 图像目录或 zip",
    )
    add("--fix_image_count", **FIX_FLAG)
    add("--annotations", type=Path, help="VQA's answers / VQA 答案文件")
    add("--prompt", default=PROMPT, help="the question for captions / 描述的提问 (%(default)s)")
    add(
        "--images",
        choices=("zip", "folder"),
        default="zip",
        help="where a .jsonl has its images: NAME_images.zip or NAME_images / 图像存放方式",
    )
    add("--max_side", type=int, help="make larger images smaller, in pixels / 图片最长边")
    add(
        "--jpeg_quality",
        type=int,
        help=f"make every image a JPEG; without it only those made smaller, at {DEFAULT_QUALITY} "
        "/ JPEG 质量",
    )
    add(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        help="a larger image is a fault / 图片像素上限 (%(default)s)",
    )
    add(
        "--num_processes",
        type=int,
        default=os.cpu_count() or 1,
        help="at once / 进程数 (%(default)s)",
    )
    add("--faults", type=Path, help="write every fault, a JSON object a line / 写出全部问题")
    return parser.parse_args(argv)  # fmt: skip


class NoRecordError(ValueError):
    """Nothing could be converted."""


def images_place(args: argparse.Namespace) -> Path | None:
    """Where the pictures go: a zip or a folder; None for Parquet, which holds them itself."""
    if args.to.suffix == ".parquet":
        return None
    name = f"{args.to.stem}_images{'.zip' if args.images == 'zip' else ''}"
    return Path(args.to).with_name(name)


def result_places(args: argparse.Namespace) -> list[Path]:
    """All that is written, but for the faults."""
    return [path for path in (args.to, images_place(args)) if path is not None]


def work_folder(args: argparse.Namespace) -> Path:
    """Where the parts lie until they are joined."""
    return Path(args.to).resolve().with_name(f".{args.to.name}.parts")


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot be, and to write over what is there; ValueError."""
    from model.evaluation.result_files import check_result_files

    if args.to.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--to {args.to} must end with .jsonl or .parquet")
    limits = {"max_side": (1, 65500), "jpeg_quality": (1, 100), "num_processes": (1, 1024)}
    for name, (least, most) in (limits | {"max_pixels": (1, sys.maxsize)}).items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name} must be {least} to {most}, got {value}")
    named = {str(path): path for path in (*args.paths, args.annotations, args.images_path) if path}
    check_result_files({"--to": args.to, "--faults": args.faults}, named)
    if not is_joining(work_folder(args), result_places(args)):
        check_absent(args)


def check_absent(args: argparse.Namespace) -> None:
    """Raise ValueError where the result would be written over what is there."""
    for place in result_places(args):
        if os.path.lexists(place):
            raise ValueError(f"{place} is there already; delete it or name another by --to")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """All that the result depends on, as JSON holds it."""
    names = ("layout", "prompt", "fix_image_count", "max_side", "jpeg_quality", "max_pixels")
    read = [*args.paths, args.annotations, args.images_path]
    return {
        **{name: getattr(args, name) for name in names},
        "read": [_state(path) for path in read if path is not None],
    }


def _state(path: Path) -> list[Any]:
    """A file or folder, all files below it included, with what changes when it is written."""
    about = path.stat()
    if path.is_file():
        return [str(path.resolve()), about.st_size, about.st_mtime_ns]
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            own = os.stat(os.path.join(folder, name), follow_symlinks=False)
            text = f"{os.path.join(folder, name)!a} {own.st_size} {own.st_mtime_ns}\n"
            digest.update(text.encode())
    return [str(path.resolve()), digest.hexdigest(), None]


def kept(items: Iterator[PlainRecord | Fault], faults: FaultBook) -> Iterator[PlainRecord]:
    """The records; faults go into the book."""
    for item in items:
        if isinstance(item, Fault):
            faults.add(item)
        else:
            yield item


@contextlib.contextmanager
def image_store(place: Path) -> Iterator[StorePicture]:
    """Takes the pictures; the zip or folder appears when the block ends well."""
    from model.machine.atomic_file import staged_write

    if place.suffix != ".zip":
        with whole_folder(place) as folder:
            yield into_folder(folder)
        return
    with tempfile.TemporaryFile(dir=place.parent) as spool:
        with ZipWriter(spool) as archive:
            yield archive.add
        spool.seek(0)
        with staged_write(place, lambda file: shutil.copyfileobj(spool, file)):
            pass


def join(args: argparse.Namespace, converter: Converter, faults: FaultBook) -> int:
    """Write the result from the parts; returns the number of records.

    Raises:
        ValueError: there is no record, or something is there. OSError: it cannot be written.
    """
    from model.machine.atomic_file import atomic_write

    num = 0

    def records() -> Iterator[PlainRecord]:
        nonlocal num
        for record in kept(converter.read(), faults):
            num += 1
            yield record

    def write_table(file: IO[bytes]) -> None:
        write_parquet(file, records())
        check()

    def check() -> None:
        if not num:
            raise NoRecordError("no record could be converted, so nothing was written")

    if not is_joining(converter.folder, result_places(args)):
        check_absent(args)  # the work may have taken hours
        begin_joining(converter.folder, result_places(args), atomic_write)
    place = images_place(args)
    if place is None:
        atomic_write(args.to, write_table)
        return num
    with tempfile.TemporaryFile(dir=converter.folder) as lines:
        with image_store(place) as store:
            lines.writelines(json_lines(records(), store))
            check()
        lines.seek(0)
        atomic_write(args.to, lambda file: shutil.copyfileobj(lines, file))
    return num


def convert(args: argparse.Namespace) -> int:
    """Convert what the flags say; returns the exit status.

    Raises:
        ValueError, FileNotFoundError, OSError: the command cannot be done.
    """
    from model.machine.atomic_file import atomic_write
    from model.machine.terminal import one_line
    from model.vision.pictures import open_image

    args.paths = [file for path in args.paths for file in resolve(path)]
    check_args(args)
    folder = work_folder(args)
    with only_run(folder):
        layout = open_sources(
            args.paths,
            lambda path: Source(
                path, args.images_path, args.annotations, args.prompt, bool(args.fix_image_count)
            ),
            args.layout,
        )
        if layout.emptiness:
            print(f"warning: {one_line(layout.emptiness)}", file=sys.stderr)
        resizing = Resizing(args.max_side, args.jpeg_quality, args.max_pixels)
        converter = Converter(layout, resizing, open_image, atomic_write, folder)
        settings = settings_of(args)
        if not is_made_for(folder, settings):
            check_absent(args)
        if prepare_folder(folder, settings, atomic_write):
            print(f"going on: {converter.num_parts - len(converter.missing())} of "
                  f"{converter.num_parts} parts are there")  # fmt: skip
        done = len(layout) - sum(map(converter.num_records, converter.missing()))
        with tqdm(total=len(layout), initial=done, unit=" records", disable=None) as bar:
            for num in make_parts(converter, num_processes=args.num_processes):
                bar.update(num)
        return finish(args, converter)


def finish(args: argparse.Namespace, converter: Converter) -> int:
    """Join the parts, remove them, and say what came out; returns the exit status."""
    from model.machine.atomic_file import atomic_write
    from model.machine.terminal import one_line

    faults = FaultBook()
    try:
        num = join(args, converter, faults)
    except NoRecordError as error:
        print(f"error: {error}", file=sys.stderr)
        num = 0
    if args.faults:
        lines = (json.dumps(vars(fault), ensure_ascii=True) + "\n" for fault in faults)
        atomic_write(args.faults, lambda file: file.writelines(line.encode() for line in lines))
    for line in fault_lines(faults, NUM_FAULTS):
        print(one_line(line))
    remove_parts(converter.folder)
    if num:
        place = images_place(args)
        beside = f" and {place}" if place is not None and place.exists() else ""
        print(one_line(f"wrote {num:,} records to {args.to}{beside}"))
    return FAULTY if len(faults) or not num else DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    from model.machine.terminal import one_line

    args = parse_args(list(argv) if argv is not None else None)
    try:
        return convert(args)
    except KeyboardInterrupt:
        print(
            "stopped; the same command goes on from here / 已中断，同一命令可继续", file=sys.stderr
        )
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return WRONG_USE


if __name__ == "__main__":
    sys.exit(main())
