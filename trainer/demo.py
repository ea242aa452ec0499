"""The whole chain on the sample world, with the real scripts: data, pretrain, sft, scores, report.

    python trainer/demo.py
    python trainer/demo.py --from_zero 1

The first (`make demo`) starts from the tiny tower and language model of the repository; the second
(`make from-zero`) makes those too, from generated data alone. Both end with a table, the picture
`report.png` and the commands to go on with. What a run finds done, it does not do again.

The folder of a chain keeps its settings (`chain.json`); with other settings a run refuses to go on
there.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from model.options import OnceParser, parse_bool
from trainer.chain.report import print_table, write_report
from trainer.chain.running import INTERRUPTED, check_settings
from trainer.chain.settings import FROM_ZERO, VLM, Chain, chain_settings
from trainer.chain.steps import evaluate, make_data, publish, train, train_llm, train_tower
from trainer.measuring.matrix_rate import matrix_rate


def print_next_steps(chain: Chain) -> None:
    """The three commands to go on with."""
    model = f"--weight {chain.out / VLM}.pth --vision_model_path {chain.tower}"
    print(f"""
Go on with:
  chat       {sys.executable} eval_vlm.py --chat {model}
  web page   {sys.executable} web_demo.py {model}
  real data  {sys.executable} dataset/download.py --help""")


def parse_args(argv: list[str] | None) -> tuple[Chain, argparse.Namespace]:
    """The chain that the flags describe, and the other flags."""
    parser = OnceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--from_zero",
        type=parse_bool,
        nargs="?",
        const=True,
        default=False,
        help="make tower and language model too / 从零训练视觉塔和语言模型",
    )
    add(
        "--publish",
        type=parse_bool,
        nargs="?",
        const=True,
        default=False,
        help="copy what --from_zero made over the repository's own / 覆盖仓库中的权重",
    )
    add("--seed", type=int, help="of the stages with images / 视觉语言阶段的随机种子")
    for name, text in (
        ("tower_steps", "of the tower / 视觉塔训练步数"),
        ("num_pretrain", "pictures of the first stage / 预训练图片数"),
        ("num_train", "pictures of the second / 微调图片数"),
        ("num_heldout", "held-out pictures / 留出图片数"),
    ):
        add(f"--{name}", type=int, help=text)
    add("--text_share", type=float, help="of the texts from zero / 文本比例")
    args = parser.parse_args(argv)
    if args.publish and not args.from_zero:
        parser.error("--publish needs --from_zero 1")
    names = ("seed", "tower_steps", "text_share", "num_pretrain", "num_train", "num_heldout")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Chain(**((FROM_ZERO if args.from_zero else {}) | given)), args


def has_own_start(chain: Chain) -> bool:
    """Whether the repository's tower and language model are there; prints what to do if not."""
    if chain.llm.is_file() and (chain.tower / "config.json").is_file():
        return True
    print(
        f"error: the repository's {chain.llm} or {chain.tower} is missing; fetch them by "
        "`git checkout -- out model/vision_model`, or make them anew by `make from-zero` "
        "(an hour or two on 2 CPU cores) and `python trainer/demo.py --from_zero 1 "
        "--publish 1`",
        file=sys.stderr,
    )
    return False


def run_chain(chain: Chain, *, is_from_zero: bool) -> int:
    """Make, train, evaluate and report; returns the exit status."""
    try:
        make_data(chain)
        if is_from_zero:
            train_tower(chain)
            train_llm(chain)
        train(chain)
        scores = evaluate(chain)
    except subprocess.CalledProcessError as error:
        print(f"error: the step above ended with status {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nleft; the same command goes on from here (a data set or a tower in the making "
            "begins anew) / 重新运行即可继续"
        )
        return INTERRUPTED
    write_report(chain)
    print_table(scores)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the chain; returns the exit status."""
    chain, args = parse_args(argv)
    if not args.from_zero and not has_own_start(chain):
        return 1
    started_s = time.perf_counter()
    try:
        check_settings(chain.folder, chain_settings(chain, is_from_zero=args.from_zero))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"matrix products: {matrix_rate():.0f} GFLOP/s in float32")
    if status := run_chain(chain, is_from_zero=args.from_zero):
        return status
    cpu_s = sum(os.times()[:4])
    print(
        f"\n{time.perf_counter() - started_s:.0f} s, {cpu_s:.0f} CPU-seconds; "
        f"curves and answers: {chain.out / 'report.png'}"
    )
    if args.publish:
        publish(chain)
    print_next_steps(chain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
