"""Offers the command that tries on a GPU all that needs one, and writes the results to one text
file.

    make test-gpu
    python tests/gpu/run.py --report out/gpu_report.txt

`run.py` sees to the packages first. Every case goes on after another's failure; one that hangs
ends the report where it stands. `--rehearsal 1 --device cpu` tries the cases themselves, tiny.
"""

import argparse
import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `gpu` and `support`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from gpu import cases_compute, cases_ranks, cases_train
from gpu.room import Case, Room, Skip

from model.machine.device import choose_device, prepare_device
from model.machine.paths import OUT_DIR
from model.options import parse_bool
from trainer.tracking.environment import git_state, versions

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 8.0
GRACE_S = 30  # for the case that runs when time is up
PASSED, FAILED, SKIPPED, NOT_RUN = "pass", "FAIL", "skip", "not run"


class Report:
    """The text file, whole after every line; the console sees each line too."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115, open to the end
        self.counts = dict.fromkeys((PASSED, FAILED, SKIPPED, NOT_RUN), 0)

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        self._file.write(text + "\n")
        self._file.flush()

    def outcome(self, kind: str, case: Case, text: str, *, took_s: float) -> None:
        self.counts[kind] += 1
        self.line(f"{kind:7}  {case.name}  [{took_s:.1f} s]  {text}")


def describe_machine(device: torch.device) -> list[str]:
    """What a reader must know of the machine."""
    about = versions() | {
        "CUDA": str(torch.version.cuda),
        "HIP": str(torch.version.hip),
        "cuDNN": str(torch.backends.cudnn.version()),
        "OS": platform.platform(),
    }
    lines = [
        f"MiniMind-V on a GPU, {datetime.now():%Y-%m-%d %H:%M}, git {git_state()}",
        " | ".join(f"{name} {value}" for name, value in about.items()),
    ]
    if device.type != "cuda":
        return [*lines, f"device {device}: a rehearsal, not a GPU"]
    about = torch.cuda.get_device_properties(device)
    return [
        *lines,
        f"device {device}: {about.name}, compute capability {about.major}.{about.minor}, "
        f"{about.total_memory / 2**30:.1f} GiB, {about.multi_processor_count} multiprocessors; "
        f"driver {driver_version()}; {os.cpu_count()} CPU cores",
    ]


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown (no nvidia-smi)"
    return said.stdout.split("\n")[0].strip()


def run_case(report: Report, room: Room, case: Case) -> None:
    """Try one case and note what came of it."""
    started_s = time.monotonic()
    if started_s > room.deadline_s:
        report.outcome(NOT_RUN, case, "out of time; --minutes gives more", took_s=0)
        return
    torch.manual_seed(0)
    try:
        kind, text = PASSED, case.run(room)
    except Skip as reason:
        kind, text = SKIPPED, str(reason)
    except Exception as error:
        kind, text = FAILED, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        room.details.append(f"{case.name}\n{traceback.format_exc()}")
    report.outcome(kind, case, text, took_s=time.monotonic() - started_s)
    room.tidy()


def all_cases(room: Room) -> list[Case]:
    """Every case; what takes long comes last, so that short of time little is left out."""
    training = cases_train.cases(room)
    first = [case for case in training if "x" not in case.name.split(":")[0]]
    rest = [case for case in training if case not in first]
    return [*first, *cases_compute.cases(room), *cases_ranks.cases(room), *rest]


@contextlib.contextmanager
def watchdog(report: Report, seconds: float):
    """End the program where a case hangs; the report holds what was done before."""

    def end() -> None:
        report.line(f"FAIL     hung: no end within {seconds:.0f} s; the line above is the last")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", help="default: the best / 默认自动选择")
    add("--report", type=Path, default=OUT_DIR / "gpu_report.txt", help="file / 报告文件")
    add("--minutes", type=float, default=MINUTES, help="no case starts later / 时间上限")
    add("--only", default="", help="REGEX of the names of cases / 只跑名称匹配的")
    add("--rehearsal", type=parse_bool, default=False, help="tiny, for a CPU / 演练")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where something failed, or was left out for want of time."""
    args = parse_args(argv)
    started_s = time.monotonic()
    try:
        device = prepare_device(choose_device(args.device))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if device.type != "cuda" and not args.rehearsal:
        print(
            f"error: this tests a GPU and found only {device}; `--rehearsal 1` tries the cases "
            "themselves",
            file=sys.stderr,
        )
        return 1
    report, limit_s = Report(args.report), 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder, watchdog(report, limit_s + GRACE_S):
        room = Room(device, Path(folder), args.rehearsal, started_s + limit_s)
        for line in (*describe_machine(device), ""):
            report.line(line)
        for case in all_cases(room):
            if re.search(args.only, case.name):
                run_case(report, room, case)
        for text in room.details:
            report.line(f"\n{text}")
    counts = ", ".join(f"{number} {kind}" for kind, number in report.counts.items())
    report.line(f"\n{counts}; {time.monotonic() - started_s:.0f} s; report: {report.path}")
    return int(bool(report.counts[FAILED] or report.counts[NOT_RUN]))


if __name__ == "__main__":
    sys.exit(main())
