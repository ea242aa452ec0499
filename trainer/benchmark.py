"""Measures how fast a stage trains, and where its time goes.

    python trainer/benchmark.py
    python trainer/benchmark.py --stage sft --baseline --json sft.json
    python trainer/benchmark.py --stage pretrain --generation 3 --cache_vision_features 1
    python trainer/benchmark.py --compare before.json after.json

It builds what the stage's script builds, with new weights: the tower of the generation in its full
size, and JPEGs that come through the ordinary loader. Every flag of the stage's script may be
given. With `--baseline` the same stage is also trained as the original programs do, in turn: in
float32, every sample padded to --max_seq_len, the tower at every step, logits of every position.
The last line is the report as JSON. Nothing is kept.
"""

import argparse
import json
import platform
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model.machine.atomic_file import atomic_write, check_place
from model.machine.device import memory_guard
from model.options import OnceParser, parse_bool, parse_path
from trainer.loop.randomness import setup_seed
from trainer.measuring.figures import (
    phase_rates,
    print_comparison,
    print_phases,
    print_run,
    run_figures,
    speedup,
)
from trainer.measuring.materials import make_records, make_tower
from trainer.measuring.matrix_rate import matrix_rate
from trainer.measuring.runs import UNTIMED_STEPS, OrdinaryRun, PlainRun
from trainer.ranks.group import Ranks
from trainer.run.report import INTERRUPTED
from trainer.run.setup import start_device
from trainer.stages import STAGES
from trainer.tracking.environment import versions
from trainer.tracking.metrics import peak_gib
from trainer.train_args import TrainArgs
from trainer.train_args import parse_args as parse_stage_args

PARTS = {"setting", "machine", "matrix_gflops", "ordinary"}  # of a report
MANY = 10**6  # epochs, and steps between logs and saves: no round sees an end


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this script, and the words that are for the stage's."""
    parser = OnceParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--stage", choices=("pretrain", "sft"), default="pretrain", help="what trains / 阶段")
    add("--rounds", type=int, default=5, help="medians are over these / 轮数")
    add("--steps", type=int, default=5, help="optimizer steps in a round / 每轮步数")
    baseline_help = "train as the original programs do, too, in turn / 与原程序方式交替对比"
    add("--baseline", type=parse_bool, nargs="?", const=True, default=False, help=baseline_help)
    add("--json", type=parse_path, help="file for the report / 结果文件")
    add(
        "--compare",
        type=parse_path,
        nargs=2,
        metavar=("A", "B"),
        help="print two reports side by side and measure nothing / 对比两份结果",
    )
    own, rest = parser.parse_known_args(argv)
    for name in ("rounds", "steps"):
        if getattr(own, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(own, name)}")
    parse_stage_args(STAGES[own.stage], rest, description=__doc__)  # ends on one that is wrong
    return own, rest


def stage_args(own: argparse.Namespace, rest: list[str], folder: Path) -> TrainArgs:
    """The stage's arguments, with data, tower and folders made for this benchmark."""
    stage = STAGES[own.stage]
    usual = {
        "from_weight": "none",
        "epochs": MANY,
        "log_interval": MANY,
        "save_interval": MANY,
        "save_dir": folder,
        "checkpoint_dir": folder,
        "num_workers": 1,
    }
    words = [word for name, value in usual.items() for word in (f"--{name}", str(value))]
    args = parse_stage_args(stage, [*words, *rest], description=__doc__)
    if args.vision_model_path is None:
        args.vision_model_path = folder / "tower"
        make_tower(args.vision_model_path, generation=args.generation)
    if args.data_path is None:
        steps = own.rounds * (own.steps + UNTIMED_STEPS)
        num_records = max(64, steps * args.batch_size * args.accumulation_steps)
        made = make_records(folder, stage=own.stage, num_records=num_records)
        args.data_path, args.images_path = made
    return args


def measure(own: argparse.Namespace, args: TrainArgs, ranks: Ranks) -> dict[str, Any]:
    """The report: rounds of both ways to train, in turn."""
    ordinary = OrdinaryRun(STAGES[own.stage], args, ranks, keeps_plain=own.baseline)
    dtypes = {"float32", args.dtype}
    gflops = {name: matrix_rate(getattr(torch, name), ranks.device) for name in sorted(dtypes)}
    flop = ordinary.flop(own.steps)
    peak = peak_gib(ranks.device)
    plain, plain_flop = None, {"total": 0.0}
    if own.baseline:
        plain = PlainRun(ordinary.plain, args, ordinary.parts.dataset, ordinary.pad)
        plain_flop = plain.flop()
    rounds, plain_rounds = [], []
    for number in range(own.rounds):
        rounds.append(ordinary.round(own.steps))
        if plain is not None:
            plain_rounds.append(plain.round(own.steps))
        for name in gflops:  # the best that was seen: a neighbour may have slowed another try
            gflops[name] = max(gflops[name], matrix_rate(getattr(torch, name), ranks.device))
        print(f"round {number + 1} of {own.rounds}: {rounds[-1].seconds / own.steps:.3f} s a step")
    figures = run_figures(rounds, flop=flop, gflops=gflops[args.dtype])
    phases = ordinary.phases(own.steps)
    rates = phase_rates(phases, step_s=figures["step_s"], flop=flop, gflops=gflops[args.dtype])
    report: dict[str, Any] = {
        "setting": {"stage": own.stage, "steps": own.steps, **told(args)},
        "machine": machine(ranks),
        "matrix_gflops": gflops,
        "ordinary": figures | {"phases": phases, "phase_shares": rates, "peak_gib": peak},
    }
    if plain is not None:
        rate = gflops["float32"]
        report["plain"] = run_figures(plain_rounds, flop=plain_flop, gflops=rate)
        report["speedup"] = speedup(rounds, plain_rounds)
        plain.close()
    ordinary.close()
    return report


def read_report(path: Path) -> dict[str, Any]:
    """A report of `--json`.

    Raises:
        ValueError, OSError: the file is none, or cannot be read.
    """
    try:
        report = dict(json.loads(path.read_text(encoding="utf-8")))
        if report.keys() >= PARTS:
            return report
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path} is no report that --json of this script wrote")


def told(args: TrainArgs) -> dict[str, Any]:
    """The arguments that a speed depends on."""
    paths = ("save_dir", "checkpoint_dir", "data_path", "images_path", "vision_model_path")
    return {name: value for name, value in args.as_text().items() if name not in paths}


def machine(ranks: Ranks) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if ranks.device.type == "cuda":
        name = torch.cuda.get_device_name(ranks.device)
    return versions() | {
        "device": f"{ranks.device.type}: {name}",
        "threads": torch.get_num_threads(),
    }


def print_measured(report: dict[str, Any]) -> None:
    """The report for people."""
    rates = ", ".join(f"{rate:.0f} in {name}" for name, rate in report["matrix_gflops"].items())
    print(f"\nmatrix products: {rates} GFLOP/s")
    ordinary = report["ordinary"]
    print_run("ordinary", ordinary)
    print_phases(ordinary["phases"], ordinary["phase_shares"])
    print(f"data wait {ordinary['data_wait']:.1%}, peak memory {ordinary['peak_gib']:.2f} GiB")
    if "plain" in report:
        print_run("plain", report["plain"])
        print(f"ordinary is {report['speedup']:.2f} times as fast as plain")
    print(json.dumps(report))


def main(argv: list[str] | None = None) -> int:
    """Measure, or compare two reports; returns the exit status."""
    try:
        own, rest = parse_args(argv)
        if own.compare:
            print_comparison(*map(read_report, own.compare))
            return 0
        if own.json:
            check_place(own.json, flag="--json")  # now, not after minutes of measuring
        with tempfile.TemporaryDirectory() as name, memory_guard("lower --batch_size"):
            args = stage_args(own, rest, Path(name))
            ranks = start_device(args)
            if ranks.world_size > 1:
                raise ValueError("this measures one process; start it without torchrun")
            setup_seed(args.seed)
            report = measure(own, args, ranks)
        print_measured(report)
        if own.json:
            text = json.dumps(report, indent=1) + "\n"
            atomic_write(own.json, lambda file: file.write(text.encode()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nleft; nothing is kept", file=sys.stderr)
        return INTERRUPTED + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
