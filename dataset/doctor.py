"""Says what a data set holds, what is wrong with it, and what an epoch of it costs.

    python -m dataset.doctor my/train.jsonl --images_path my/images --html report.html
    python -m dataset.doctor my/train.parquet --against my/val.parquet --write_clean clean.parquet

Every record is read, its prompt is built and its pictures are decoded as training does. The exit
status is 0 if all records are usable, 1 if there are faults (records that leak into the set of
`--against` are faults), 2 if the command itself is wrong, and 130 after Ctrl-C.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.converting.clean import clean_images_path, write_clean
from dataset.examining.examine import Examiner
from dataset.examining.exhibits import Pair, choose_exhibits, show_pairs
from dataset.examining.html_report import render
from dataset.examining.sources import FIX_FLAG, Sources
from dataset.examining.survey import Examined, compare, examine, figures_of
from dataset.examining.text_report import report_lines

CLEAN, FAULTY, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MiB as RGB
NUM_PAIRS = 6  # of leaking pictures that the page shows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="data files / 数据文件")
    add(
        "--images_path",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="folder or zip of the images: one for all files or one for each / 图像目录或 zip",
    )
    add(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="a held-out set that must not overlap / 留出集，检查泄漏",
    )
    add(
        "--against_images_path",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="images of the held-out set (default: --images_path) / 留出集的图像",
    )
    add("--fix_image_count", **FIX_FLAG)
    add("--max_seq_len", type=int, default=640, help="tokens of a sample / 最大长度 (%(default)s)")
    add(
        "--batch_size",
        type=int,
        default=16,
        help="samples of a step, for steps and padding of an epoch / 批大小 (%(default)s)",
    )
    add(
        "--tokens_per_s",
        type=float,
        help="what training takes a second (trainer/benchmark.py says it) / 每秒词元数",
    )
    add(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        help="a larger picture is a fault / 图片像素上限 (%(default)s)",
    )
    add("--html", type=Path, help="write the report as a page / HTML 报告")
    add("--num_samples", type=int, default=12, help="samples on the page / 样本数 (%(default)s)")
    add("--json", type=Path, help="write the figures / 写出统计数据")
    add("--faults", type=Path, help="write every fault, a JSON object a line / 写出全部问题")
    add(
        "--num_faults",
        type=int,
        default=10,
        choices=range(11),
        metavar="0..10",
        help="faults of a kind that are printed / 每类打印的条数 (%(default)s)",
    )
    add(
        "--write_clean",
        type=Path,
        help="write the usable records: .parquet, or .jsonl with a zip / 写出无问题的记录",
    )
    add(
        "--num_workers",
        type=int,
        default=max(1, (os.cpu_count() or 1) - 1),
        help="processes that examine; 0: this one / 进程数 (%(default)s)",
    )
    add(
        "--generation",
        type=int,
        choices=(2, 3),
        default=2,
        help="of the model / 模型代 (%(default)s)",
    )
    add("--vision_model_path", type=Path, help="folder of the tower / 视觉模型目录")
    add("--tokenizer_path", type=Path, help="folder of the tokenizer / 分词器目录")
    return parser.parse_args(argv)  # fmt: skip


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot be, and places that cannot be written, before the work; ValueError."""
    from model.evaluation.result_files import check_result_files

    limits = (("max_seq_len", 1), ("batch_size", 1), ("max_pixels", 1), ("num_samples", 0))
    for name, least in (*limits, ("num_workers", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be {least} or more, got {getattr(args, name)}")
    if args.tokens_per_s is not None and not args.tokens_per_s > 0:
        raise ValueError(f"--tokens_per_s must be over 0, got {args.tokens_per_s}")
    if args.write_clean and args.write_clean.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"--write_clean {args.write_clean} must end with .parquet or .jsonl")
    results = {f"--{n}": getattr(args, n) for n in ("html", "json", "faults", "write_clean")}
    if args.write_clean and args.write_clean.suffix == ".jsonl":
        results["the images of --write_clean"] = clean_images_path(args.write_clean)
    named = (*args.paths, *args.images_path, *args.against, *args.against_images_path)
    check_result_files(results, {str(path): path for path in named})


def open_held_out(args: argparse.Namespace) -> Sources | None:
    """The records of `--against`; ValueError if there is none to compare with."""
    if not args.against:
        return None
    images = args.against_images_path or (args.images_path if len(args.images_path) == 1 else [])
    sources = Sources(
        args.against, images, fix_image_count=bool(args.fix_image_count), flag="--against"
    )
    if not len(sources):
        raise ValueError(f"--against cannot be used: {sources.faults[0]}")
    return sources


def build_examiner(args: argparse.Namespace, sources: Sources) -> Examiner:
    """The examiner of records with the processor that the flags describe.

    Raises:
        FileNotFoundError, ValueError: no tokenizer or tower there, or they do not fit.
    """
    from model.vision.pictures import open_image
    from model.vision_tower import find_vision_dir, load_image_processor, load_vision_config
    from model.vlm_processor import VLMProcessor, load_tokenizer
    from model.weights.build_model import placeholder_config

    generation = args.generation
    tokenizer = load_tokenizer(args.tokenizer_path, generation=generation)
    tower = find_vision_dir(args.vision_model_path, generation=generation)
    config = placeholder_config({"generation": generation}, tokenizer, tower)
    images = load_image_processor(tower, load_vision_config(tower))
    processor = VLMProcessor(tokenizer, images, config=config)
    return Examiner(
        sources, processor, open_image, max_length=args.max_seq_len, max_pixels=args.max_pixels
    )


def write_results(
    args: argparse.Namespace, found: Examined, figures: dict[str, Any], leaks: list[Pair]
) -> None:
    """Write the files that the flags ask for."""
    from model.evaluation.result_files import write_html, write_json
    from model.machine.atomic_file import atomic_write

    if args.faults:
        lines = (json.dumps(vars(fault), ensure_ascii=False) for fault in found.faults)
        encoded = (f"{line}\n".encode("utf-8", "backslashreplace") for line in lines)
        atomic_write(args.faults, lambda file: file.writelines(encoded))
    if args.json:
        write_json(args.json, figures | {"faults": dict(found.faults.counts)})
    if args.html:
        shown = choose_exhibits(found.examiner, found.tally, figures, num=args.num_samples)
        shown = replace(shown, leaks=leaks)
        write_html(args.html, render(figures, found.faults, shown, tokens_per_s=args.tokens_per_s))
    if args.write_clean:
        write_clean(args.write_clean, found, atomic_write)


def diagnose(args: argparse.Namespace) -> int:
    """Examine, report and write; returns the exit status.

    Raises:
        ValueError, FileNotFoundError, OSError: the command cannot be done.
    """
    from model.machine.terminal import one_line

    check_args(args)
    held_out_sources = open_held_out(args)
    fix = bool(args.fix_image_count)
    sources = Sources(args.paths, args.images_path, fix_image_count=fix)
    for line in sources.emptiness:
        print(f"warning: {one_line(line)}", file=sys.stderr)
    examiner = build_examiner(args, sources)
    found = examine(examiner, num_workers=args.num_workers, what="examining")
    figures = figures_of(found, batch_size=args.batch_size)
    leaks: list[Pair] = []
    if held_out_sources is not None:
        other = examiner.of(held_out_sources)
        held_out = examine(other, num_workers=args.num_workers, what="held out")
        leakage = compare(found, held_out, num_pairs=NUM_PAIRS)
        figures["leakage"] = leakage.figures
        leaks = show_pairs(examiner, other, leakage.pairs) if args.html else []
    for line in report_lines(
        figures, found.faults, num_shown=args.num_faults, tokens_per_s=args.tokens_per_s
    ):
        print(one_line(line))
    write_results(args, found, figures, leaks)
    for place in filter(None, (args.html, args.json, args.faults, args.write_clean)):
        print(f"wrote {one_line(str(place))}")
    return FAULTY if len(found.faults) else CLEAN


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    from model.machine.terminal import one_line

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    args = parse_args(list(argv) if argv is not None else None)
    try:
        return diagnose(args)
    except KeyboardInterrupt:
        print("stopped; nothing was written / 已中断", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        print("error: a process that reads the data was killed, perhaps for want of memory; "
              "lower --num_workers", file=sys.stderr)  # fmt: skip
        return WRONG_USE
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return WRONG_USE


if __name__ == "__main__":
    sys.exit(main())
