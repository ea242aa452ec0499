"""Owns the trackers of `--use_wandb` and `--tracker`, seen from training.

A tracker runs in a process of its own (`tracker_process.py`): it may ask for a login, wait for the
network, install signal handlers or crash without any effect on training. Only the main
process has one.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.ranks.group import warn
from trainer.tracking.tracker_process import REPORTED, TITLES
from trainer.train_args import TrainArgs

PROGRAM = Path(__file__).with_name("tracker_process.py")
PATIENCE_S = 30  # how long a finished run waits for its tracker
PATIENCE_STOPPED_S = 10  # and one that a scheduler stops


def check_tracker(args: TrainArgs) -> None:
    """Raise ValueError unless the packages of the chosen tracker are installed."""
    name = args.tracker_name()
    if name is None:
        return
    if find_spec(name) is None:
        raise ValueError(f"--tracker {name} needs the package {name}: pip install {name}")
    if name == "swanlab" and args.tracker_mode == "local" and find_spec("swanboard") is None:
        raise ValueError("SwanLab's local mode needs its dashboard: pip install swanlab[dashboard]")


def choose_experiment(args: TrainArgs, before: dict[str, Any]) -> dict[str, Any]:
    """The experiment that a run writes to. A state holds it, so that a resumed run finds it again.

    Args:
        before: the same of the run that is resumed, else {}.
    """
    name = args.tracker_name()
    if name is None or before.get("tracker") == name:
        return before
    return {"tracker": name, "id": uuid.uuid4().hex[:21], "name": args.wandb_run_name}


class Tracker:
    """A sink of figures that hands them to the tracker's process.

    Args:
        about: from `choose_experiment`.
        resumed_step: the step that the run goes on from; None for a new run.
        folder: where TensorBoard's files go; the others choose below the current directory.
    """

    def __init__(
        self, args: TrainArgs, about: dict[str, Any], *, resumed_step: int | None, folder: Path
    ):
        self._title = TITLES[about["tracker"]]
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        first = about | {
            "mode": args.tracker_mode,
            "project": args.wandb_project,
            "resumed_step": resumed_step,
            "config": args.as_text(),
            "folder": str(folder.resolve()),
        }
        self._put(first)
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=2,  # a tracker prints messages, such as the address of the run
            start_new_session=True,  # Ctrl-C reaches training alone, which then sends the end
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )
        self._is_left_behind = False
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def _put(self, message: dict[str, Any]) -> None:
        self._lines.put(json.dumps(message) + "\n")

    def _pump(self) -> None:
        """Write lines as fast as the tracker reads them; this thread may wait for it."""
        with contextlib.suppress(OSError), self._process.stdin as pipe:  # it may have ended
            while (line := self._lines.get()) is not None:
                pipe.write(line.encode())
                pipe.flush()
        if self._process.wait() not in (0, REPORTED) and not self._is_left_behind:
            warn(
                f"{self._title} ended by itself (status {self._process.returncode}) and is left "
                "out from here on; the metrics file beside the weight goes on"
            )

    def write(self, figures: dict[str, Any]) -> None:
        self._put({"figures": {k: v for k, v in figures.items() if isinstance(v, int | float)}})

    def close(self, outcome: str) -> None:
        """Wait a limited time for the tracker to finish."""
        self._put({"end": outcome})
        self._lines.put(None)
        patience_s = PATIENCE_S if outcome == "success" else PATIENCE_STOPPED_S
        self._thread.join(timeout=patience_s)
        if self._thread.is_alive():
            self._is_left_behind = True
            warn(
                f"{self._title} did not finish within {patience_s} s and is left behind; its own "
                "files, and the metrics file beside the weight, hold what it did not send"
            )
            self._process.kill()
