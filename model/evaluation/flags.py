"""Owns flags of `eval_vlm.py`: those of describing a folder, and which contradict each other."""

import argparse
import os

from model.generation.sampling import sampling_from
from model.machine.paths import ROOT
from model.options import cache_folder, parse_bool, parse_path

LOWEST = {"batch_size": 1, "max_seq_len": 1, "num_records": 1, "num_generate": 0, "num_wrong": 1}


def add_describe_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder to describe, the question and the gallery."""
    parser.add_argument(
        "--image_dir",
        type=parse_path,
        default=ROOT / "dataset" / "eval_images",
        help="folder of images to describe / 要描述的图像目录",
    )
    prompt_help = (
        "question; without <image>, the image comes first; default: the generation's / 提问"
    )
    parser.add_argument("--prompt", help=prompt_help)
    parser.add_argument(
        "--show_speed",
        type=parse_bool,
        nargs="?",
        const=True,
        help="tokens/s to stderr, of --chat too; default: 1 in generation 3 / 显示生成速度",
    )
    parser.add_argument("--html", type=parse_path, help="write a gallery here / 生成 HTML 图集")


def check_args(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or are out of range, before anything is loaded."""
    scored = [f"--{n}" for n in ("data_path", "choices") if getattr(args, n)]
    tasks = scored + ["--chat"] * args.chat
    if args.benchmark and not args.data_path:
        raise ValueError(
            f"--benchmark {args.benchmark} needs its published file (`python dataset/download.py "
            f"{args.benchmark}`): name it by --data_path"
        )
    if len(tasks) > 1:
        raise ValueError(f"{' and '.join(tasks)} are two tasks: give one")
    needs = {"images_path": "data_path", "num_records": "data_path", "circular": "choices"}
    for name, other in needs.items():
        if getattr(args, name) and not getattr(args, other):
            raise ValueError(f"--{name} needs --{other}")
    if args.compare and not scored:
        raise ValueError("--compare needs something to score: --data_path or --choices")
    if args.html and tasks:
        raise ValueError(f"--html is a gallery of --image_dir; leave out {tasks[0]} or it")
    if args.chat and args.json:
        raise ValueError("--json holds results, and --chat has none; leave out one of both")
    if args.chat and "RANK" in os.environ:
        raise ValueError("--chat is for one process: run it without torchrun")
    if args.circular and args.choice_by == "text":
        raise ValueError(
            "--circular turns the list of options, which --choice_by text does not use"
        )
    for name, low in LOWEST.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name} must be {low} or more, got {value}")
    if cache_folder(args.cache_vision_features, args.save_dir):
        if args.benchmark:
            raise ValueError(
                "--cache_vision_features keeps features of records, not of a --benchmark; leave "
                "out one of both"
            )
        if not args.data_path:
            raise ValueError("--cache_vision_features needs --data_path")
    sampling_from(args)
