"""Scripts run to their end as one process or several ranks, and what signals do to them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_records, script_environment, train_flags

from trainer.local_ranks import run_script

SCRIPT = "trainer/train_pretrain_vlm.py"
TIMEOUT_S = 120


def test_a_script_that_fails_is_an_error(capfd):
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_script("trainer/demo.py", "--no_such_flag")
    assert error.value.returncode == 2
    assert "$ python trainer/demo.py --no_such_flag" in capfd.readouterr().out


@pytest.mark.slow
def test_one_rank_that_fails_ends_all(assets, tmp_path, capfd):
    data = make_records(tmp_path / "data", num_records=8)
    with pytest.raises(subprocess.CalledProcessError):
        run_script(SCRIPT, *train_flags(assets, tmp_path, *data, batch_size=0), num_ranks=2)
    assert "error: --batch_size" in capfd.readouterr().err


def start(argv: list[str]) -> subprocess.Popen:
    """Two ranks, started by a program in a process group of its own, as a terminal has it."""
    code = (f"import signal, sys; sys.path.insert(0, {str(ROOT)!r}); "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from trainer.local_ranks import run_script\n"
            "try: run_script(*sys.argv[1:], num_ranks=2)\n"
            "except KeyboardInterrupt: sys.exit(130)")  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", code, SCRIPT, *argv], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, env=script_environment(), start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["Ctrl-C", "SIGTERM"])
def test_stopped_ranks_save_and_go_on(sent, assets, tmp_path):
    data = make_records(tmp_path / "data", num_records=60)
    argv = train_flags(assets, tmp_path, *data, batch_size=2, epochs=1000, num_workers=1)
    process = start(argv)
    said = ""
    try:
        for line in process.stdout:
            said += line
            if line.startswith("Epoch:["):
                break
        if sent == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        said += process.stdout.read()  # to the end of the last process that holds it
        assert process.wait(TIMEOUT_S) == 130, said
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert "2 rank(s)" in said and said.count("Traceback") == 0, said
    state = tmp_path / "checkpoints" / "pretrain_vlm_32_resume.pth"
    progress = torch.load(state, weights_only=True)["progress"]
    assert progress["step"] >= 1
    assert_group_is_empty(process.pid)
    last = ["--epochs", str(progress["epoch"] + 1), "--from_resume", "1"]
    run_script(SCRIPT, *argv, *last, num_ranks=2)
    after = torch.load(state, weights_only=True)["progress"]
    assert after["samples"] == 60 * (progress["epoch"] + 1)


def assert_group_is_empty(group: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        stats = [p.read_text() for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
        if all(int(stat.rpartition(")")[2].split()[2]) != group for stat in stats):
            return
        time.sleep(0.2)
    raise AssertionError(f"group {group} still has processes")
