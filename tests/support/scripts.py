"""Runs the repository's scripts as a user does."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.tiny_parts import TINY_MODEL

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


def script_environment() -> dict[str, str]:
    """One thread a process, so that runs side by side do not fight over the cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_script(
    script: str,
    *arguments,
    cwd=None,
    check: bool = True,
    env=None,
    timeout_s=300,
    stdin=None,
    cold: bool = False,
):
    """Run a script of the repository as a user does; returns the finished process.

    Args:
        cold: whether Python starts anew: where the test is about that, or `env` holds what Python
            or a library reads as it starts. Else a process that has imported everything is forked.
    """
    if cold:
        process = run_cold(script, *arguments, cwd=cwd, env=env, timeout_s=timeout_s, stdin=stdin)
    else:
        from support import warm  # whose import takes seconds, which many tests do not need

        process = warm.run(script, *arguments, cwd=cwd, env=env, timeout_s=timeout_s, stdin=stdin)
    if check and process.returncode != 0:
        raise AssertionError(
            f"{script} ended with {process.returncode}:\n{process.stdout}\n{process.stderr}"
        )
    return process


def run_cold(*words, cwd, env, timeout_s, stdin):
    """Start Python with the script; returns the finished process."""
    return subprocess.run(
        cold_command(*words),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=script_environment() | (env or {}),
        **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
    )


def start_cold(*words, env=None, **options) -> subprocess.Popen:
    """Start Python with the script."""
    env = script_environment() | (env or {})
    return subprocess.Popen(cold_command(*words), env=env, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cold_command(script: str, *arguments) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def train_flags(assets: Path, out: Path, data: Path, images: Path | None, **flags) -> list[str]:
    """Flags of a tiny training run that writes below `out`."""
    flags = {
        "vision_model_path": assets / "tower",
        "tokenizer_path": assets / "tokenizer",
        "save_dir": out / "out",
        "checkpoint_dir": out / "checkpoints",
        "data_path": data,
        "images_path": images,
        "from_weight": "none",
        "freeze_llm": 0,
        "device": "cpu",
        "dtype": "float32",
        "num_workers": 0,
        "epochs": 1,
        "batch_size": 4,
        "log_interval": 1,
        "save_interval": 1000,
        **TINY_MODEL,
    } | flags
    return [
        text
        for name, value in flags.items()
        if value is not None
        for text in (f"--{name}", str(value))
    ]


@contextmanager
def within_s(seconds: float):
    """What waits without an end, such as for a FIFO's writer, fails after so long."""

    def give_up(*_):
        pytest.fail(f"not done within {seconds} s")  # no OSError, which the code may well catch

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
