"""Export a weight to another runtime's format, or bring a folder back as a weight.

    python -m model.export --weight sft_vlm --to llava --out out/llava
    python -m model.export --weight sft_vlm --to transformers --out out/own
    python -m model.export --weight sft_vlm --to onnx --out out/onnx
    python -m model.export --weight llm --to llama --out out/llama
    python -m model.export --weight llm --to gguf --gguf_type q8_0 --out out/gguf
    python -m model.export --load_from out/llava --to pth --out out/back/sft_vlm_512.pth
    python -m model.export --weight sft_vlm --to llava --out out/llava --push USER/NAME
    python -m model.export --out out/llava --push USER/NAME --yes

llava (linear projection, generation 2) and internvl (MLP projection, generation 3) are stock
classes of transformers, llama and qwen3 the language model alone (with experts: Qwen2-MoE and
Qwen3-MoE). gguf is the language model for llama.cpp and Ollama. onnx is
tower, embedding and decoder for onnxruntime. transformers is any
model by our own classes, whose code lies in the folder. pth reads any folder of transformers with
--load_from. --push shows what would go to Hugging Face's hub, with a model card, and sends it where
--yes says so; without --to it is the export that lies at --out.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from model.export.card import UNKNOWN, CardFacts, write_card
from model.export.gguf_file import TYPES, write_gguf
from model.export.hub import HUBS, Target, check_target, plan, push
from model.export.mmproj_file import write_mmproj
from model.export.names import PREFIXES
from model.export.new_folder import check_new_folder, new_folder
from model.export.onnx_graphs import write_onnx
from model.export.remote import write_remote
from model.export.scores import find_scores
from model.export.source import load_source
from model.export.stock import VISION_FORMATS, write_stock
from model.export.way_back import check_new_weight, write_pth
from model.machine.device import memory_guard
from model.machine.terminal import Terminated, one_line, sigterm_as_ctrl_c
from model.options import NATIVE, OnceParser, add_model_arguments, parse_bool, parse_path

REMOTE, GGUF, ONNX, PTH = "transformers", "gguf", "onnx", "pth"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line; `dtype` is the export's, never None."""
    parser = OnceParser(
        prog="python -m model.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.set_defaults(device="cpu", dtype="float32")
    add = parser.add_argument
    add("--to", choices=(*PREFIXES, GGUF, ONNX, REMOTE, PTH), help="format / 格式")
    out_help = "new folder; for pth the weight's file / 新目录；pth 则为权重文件"
    add("--out", required=True, type=parse_path, help=out_help)
    type_help = "of gguf's matrices; default: f16 / GGUF 矩阵的格式"
    add("--gguf_type", choices=TYPES, help=type_help)
    add(
        "--mmproj",
        type=parse_bool,
        nargs="?",
        const=True,
        default=False,
        help="gguf: tower and projection too / 同时写出视觉塔与投影",
    )
    add(
        "--projector_gelu",
        type=parse_bool,
        nargs="?",
        const=True,
        default=False,
        help="llava for runtimes that put a GELU into every projector / 适配固定 GELU 的运行时",
    )
    add("--license", help="of the model card, as hubs name it: apache-2.0 / 模型卡的许可证")
    add(
        "--scores",
        type=parse_path,
        help="of eval_vlm.py --json, for the card / 评测结果，写入模型卡",
    )
    _add_push_arguments(parser)
    args = parser.parse_args(argv)
    if args.to is None and args.push is None:
        parser.error("--to FORMAT is missing, or --push USER/NAME of an export at --out")
    return args


def _add_push_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--push", metavar="USER/NAME", help="show what would go to the hub / 预览上传内容")
    add("--hub", choices=HUBS, default=HUBS[0], help="which / 哪个模型库 (%(default)s)")
    add("--yes", action="store_true", help="send it / 确认上传")
    add("--force", action="store_true", help="replace files that differ / 覆盖不同的文件")
    add("--private", action="store_true", help="a new repository is / 新建私有仓库")


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    if args.push is None and (args.yes or args.force or args.private or args.hub != HUBS[0]):
        raise ValueError("--yes, --force, --private and --hub are of --push USER/NAME")
    if args.push is not None and args.to == PTH:
        raise ValueError("--push sends a folder, and --to pth makes one file; take another format")
    if args.to == ONNX and args.dtype != "float32":
        raise ValueError("--to onnx writes float32; leave --dtype out")
    if args.to in (None, PTH) and (args.license or args.scores):
        raise ValueError("--license and --scores are of an export's model card: give --to FORMAT")
    if args.push is not None:
        check_target(args.push, hub=args.hub, folder=args.out, sends=args.yes)


def export(args: argparse.Namespace) -> str:
    """Do what the flags say; returns what was written, in words.

    Raises:
        FileNotFoundError, ValueError, OSError: why nothing was.
    """
    out: Path = args.out
    loading = argparse.Namespace(**(vars(args) | {"dtype": "float32"}))
    if args.projector_gelu and args.to != "llava":
        raise ValueError("--projector_gelu is of --to llava")
    if args.projector_gelu and args.dtype != "float32":
        raise ValueError(
            "--projector_gelu adds 512 to what the projector computes, which only float32 bears; "
            "leave --dtype out"
        )
    if (args.gguf_type or args.mmproj) and args.to != GGUF:
        raise ValueError(f"{'--gguf_type' if args.gguf_type else '--mmproj'} is of --to gguf")
    if args.to == PTH:
        if args.load_from == NATIVE:
            raise ValueError("--to pth needs the folder to read: --load_from FOLDER")
        check_new_weight(out)
        write_pth(loading, out)
        return f"{out}: the weight of {args.load_from}"
    check_new_folder(out)
    sees = args.mmproj or args.to in (*VISION_FORMATS, ONNX, REMOTE)
    source = load_source(loading, with_vision=sees)
    scores = find_scores(source.path, args.scores)
    with new_folder(out) as folder:
        if args.to == REMOTE:
            name = write_remote(source, folder, dtype=args.dtype)
        elif args.to == ONNX:
            name = write_onnx(source, folder)
        elif args.to == GGUF:
            kind = args.gguf_type or TYPES[0]
            name = write_gguf(source, folder, kind=kind)
            if args.mmproj:
                name += f" and {write_mmproj(source, folder, kind=kind)}"
        else:
            name = write_stock(
                source,
                folder,
                format_name=args.to,
                dtype=args.dtype,
                projector_gelu=args.projector_gelu,
            )
        facts = CardFacts(args.to, args.push or out.name, args.license or UNKNOWN, scores)
        write_card(source, folder, facts)
    return f"{out}: {source.path.name} as {name}"


def send(args: argparse.Namespace) -> str:
    """Push the folder, or show what that would send; returns what came of it, in words.

    Raises:
        ValueError, OSError: why nothing was sent.
    """
    target = Target(args.push, private=args.private, force=args.force)
    print(plan(args.out, target))
    if args.yes:
        return push(args.out, target)
    again = f"python -m model.export --out {args.out} --push {args.push} --yes"
    return f"nothing was sent / 未上传; this sends it: {again}"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_args(argv)
    stopped = "nothing was written / 已停止，未写入任何文件"
    try:
        with sigterm_as_ctrl_c(), memory_guard("free some of it"):
            check_flags(args)
            if args.to:
                print(export(args))
            if args.push:
                stopped = f"{args.push} shows all of it or nothing / 已停止，仓库内容不会残缺"
                print(send(args))
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
