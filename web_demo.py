"""Talk to the model in the browser, or serve it to programs by the OpenAI protocol.

    python web_demo.py
    python web_demo.py --weight pretrain_vlm --port 8000
    python web_demo.py --host 0.0.0.0 --password "a secret"
    python web_demo.py --api

Only this machine can reach it unless `--host` says otherwise. Password and key may also stand in
the environment, as MINIMIND_PASSWORD and MINIMIND_API_KEY, where other users cannot read them.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from model.generation.batch import ROWS
from model.generation.engine import VLMEngine
from model.generation.sampling import add_sampling_arguments, sampling_from
from model.machine.paths import OUT_DIR, ROOT
from model.options import OnceParser, add_model_arguments, parse_path
from model.serving.api.server import check_origins, serve_api
from model.serving.web.server import serve_page
from model.serving.web.weights import Weights
from model.weights.file_names import weight_at_hand

DEMO = "sft_vlm_demo_128.pth"
# Flags of which each says which weight is meant.
NAME_A_WEIGHT = {
    "weight", "load_from", "generation", "hidden_size", "num_hidden_layers", "use_moe",
}  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OnceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, only_answers=True)
    add_sampling_arguments(parser)
    parser.set_defaults(seed=None)  # asking again means another answer
    add = parser.add_argument
    add("--api", action="store_true", help="OpenAI-compatible server, no page / 接口服务")
    add("--host", default="127.0.0.1", help="0.0.0.0: every machine can reach it / 监听地址")
    add("--port", type=int, default=7860, help="of page or server / 端口")
    add(
        "--password",
        default=os.environ.get("MINIMIND_PASSWORD"),
        help="asked of the page's visitors, with any name / 网页访问密码",
    )
    add(
        "--api_key",
        default=os.environ.get("MINIMIND_API_KEY"),
        help="asked of --api's clients / 接口密钥",
    )
    add(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages of this origin may ask --api; repeatable, * is any / 允许的网页来源",
    )
    batch_help = "answers decoded at once, in one batch / 同一批次中同时生成的回答数"
    add("--batch", "--concurrency", type=int, default=ROWS, help=batch_help)
    add("--queue", type=int, default=64, help="questions that may wait / 最多排队数")
    add(
        "--examples",
        type=parse_path,
        default=ROOT / "dataset" / "eval_images",
        help="folder of pictures to try on the page / 示例图片目录",
    )
    args = parser.parse_args(argv)
    args.names_weight = bool(parser.given & NAME_A_WEIGHT)
    return args


def take_what_is_there(args: argparse.Namespace) -> None:
    """Where no weight is named and the usual one is not there, take one that is, and say so."""
    if args.names_weight:
        return
    path = weight_at_hand(args.weight, save_dir=args.save_dir)
    if path is None:
        return
    is_demo = path == OUT_DIR / DEMO
    told = "the finished tiny model of this repository: it knows coloured shapes, little else"
    print(
        f"note: there is no weight {args.weight} yet, so this starts with {path.name}"
        f"{', ' + told if is_demo else ''}; --weight names another / 没有 {args.weight}，先用 "
        f"{path.name}",
        file=sys.stderr,
        flush=True,
    )
    args.weight = str(path)


def print_warning(engine: VLMEngine) -> None:
    if engine.warning:
        print(f"warning: {engine.warning}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    where = {"host": args.host, "port": args.port}
    limits = {"concurrency": args.batch, "queue": args.queue}
    try:
        if args.batch < 1 or args.queue < 0 or not 0 <= args.port < 65536:
            raise ValueError(
                "--batch must be at least 1, --queue at least 0, --port 0 to 65535; got "
                f"{args.batch}, {args.queue}, {args.port}"
            )
        if args.cors and not args.api:
            raise ValueError("--cors is of the server for programs; add --api, or leave it out")
        check_origins(args.cors)
        sampling_from(args)  # wrong flags are told before anything is loaded
        take_what_is_there(args)
        if args.api:
            engine = VLMEngine.from_args(args)
            defaults = sampling_from(args, engine.generation)
            print_warning(engine)
            return serve_api(
                engine, defaults, **where, **limits, api_key=args.api_key, origins=args.cors
            )
        weights = Weights(args, concurrency=args.batch)
        first = weights.get(weights.default)
        defaults = sampling_from(args, first.generation)
        print_warning(first)
        return serve_page(
            weights, defaults, **where, **limits, password=args.password, examples=args.examples
        )
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 0


if __name__ == "__main__":
    sys.exit(main())
