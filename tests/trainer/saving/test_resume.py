"""If this fails, a run stopped and resumed ends with other weights than one that was not."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.rank_group import run_ranks
from support.scripts import ROOT, cold_command, run_script, script_environment, train_flags
from support.states import assert_same_state, saved
from support.tiny_parts import make_records
from support.warm import Program

from trainer.ranks.signals import StopSignal

SCRIPT = "trainer/train_pretrain_vlm.py"
CASES = {
    "sigterm-dense-accumulated": (
        signal.SIGTERM,
        {"accumulation_steps": 3, "optimizer": "muon", "pack": 1},
    ),
    "kill9-moe-workers": (signal.SIGKILL, {"use_moe": 1, "num_workers": 2, "system_share": 0.5}),
    "sigint-moe-accumulated": (signal.SIGINT, {"use_moe": 1, "accumulation_steps": 2, "pack": 1}),
    "kill9-dense-accumulated-workers": (
        signal.SIGKILL,
        {"accumulation_steps": 3, "num_workers": 2},
    ),
    "sigterm-moe-bfloat16-workers": (
        signal.SIGTERM,
        {"use_moe": 1, "num_workers": 2, "dtype": "bfloat16"},
    ),
    "kill9-dense": (signal.SIGKILL, {}),
}
QUICK = ("sigterm-dense-accumulated", "kill9-moe-workers")


TO_US = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def interrupt(process, *, at_step: int, signum: int) -> int:
    """Send a run a signal once it logged a step, and return its exit status."""
    seen = 0
    for line in process.stdout:
        seen += bool(re.match(r"Epoch:\[\d+/\d+\]\(\d+/\d+\)", line))
        if seen == at_step:
            process.send_signal(signum)
            break
    process.stdout.read()
    return process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.full) for c in CASES]
)
def test_resume_is_bit_identical(case, assets, tmp_path):
    signum, options = CASES[case]
    data, images = make_records(tmp_path, num_records=46, multi=True)
    common = {"batch_size": 2, "epochs": 3, "save_interval": 4} | options
    whole = train_flags(assets, tmp_path / "whole", data, images, **common)
    run_script(SCRIPT, *whole)

    cut = train_flags(assets, tmp_path / "cut", data, images, **common)
    steps = -(-46 // (2 * options.get("accumulation_steps", 1))) * 3
    at_step = random.SystemRandom().randrange(5, steps - steps // 3)  # it may do a few more
    with Program(SCRIPT, *cut, **TO_US) as process:
        status = interrupt(process, at_step=at_step, signum=signum)
    graceful = signum != signal.SIGKILL
    assert status == (128 + signum if graceful else -signum), f"at step {at_step}"
    before = saved(tmp_path / "cut" / "checkpoints", "*_resume.pth")["progress"]["step"]
    assert 0 < before < steps
    # What a clean stop saved is not done again; a kill loses what came after the last save.
    is_save = before % 4 == 0 or before % (steps // 3) == 0  # the end of an epoch saves too
    assert before >= at_step if graceful else is_save

    resumed = run_script(SCRIPT, *cut, "--from_resume", 1)
    assert f"at step {before}," in resumed.stdout
    weights = [saved(tmp_path / side / "out", "*.pth") for side in ("whole", "cut")]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), f"{name}, at step {at_step}"
    states = [saved(tmp_path / side / "checkpoints", "*.pth") for side in ("whole", "cut")]
    assert_same_state(*states)

    logged = [
        [json.loads(line) for line in next((tmp_path / side / "out").glob("*.jsonl")).open()]
        for side in ("whole", "cut")
    ]
    for key in ("step", "epoch", "lr", "loss", "samples"):
        assert [m[key] for m in logged[0]] == [m[key] for m in logged[1]], key


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM])
def test_resume_on_two_ranks_is_bit_identical(signum, assets, tmp_path):
    """torchrun hands the signal on; the ranks agree on the step after which they save."""
    data, images = make_records(tmp_path, num_records=46, multi=True)
    common = {"batch_size": 2, "epochs": 5, "accumulation_steps": 2}
    folders = [tmp_path / "whole", tmp_path / "cut"]
    whole, cut = (train_flags(assets, f, data, images, **common) for f in folders)
    run_ranks(whole, tmp_path, world_size=2)
    command = [sys.executable, *TORCHRUN, str(ROOT / SCRIPT), *cut]
    with subprocess.Popen(command, env=script_environment(), text=True, **TO_US) as process:
        assert interrupt(process, at_step=7, signum=signum) != 0
    before = saved(folders[1] / "checkpoints", "*_resume.pth")["progress"]
    assert 7 <= before["step"] < 30 and before["samples"] > 0
    run_ranks([*cut, "--from_resume", "1"], tmp_path, world_size=2, name="resumed")
    assert_same_state(*(saved(f / "checkpoints", "*_resume.pth") for f in folders))


@pytest.mark.parametrize("signum", StopSignal.SIGNALS)
def test_signal_while_the_ranks_agree_counts_at_the_next_step(signum):
    """They wait for one another there, so that is when most signals come."""
    with StopSignal() as stop:
        votes = stop.votes()
        os.kill(os.getpid(), signum)
        assert not stop.adopt(votes)
        assert stop.adopt(stop.votes()) and stop.signum == signum


@pytest.mark.slow
def test_resume_with_workers_leaves_no_process_behind(assets, tmp_path):
    data, images = make_records(tmp_path, num_records=46)
    flags = train_flags(assets, tmp_path, data, images, num_workers=2, epochs=50, batch_size=2)
    with subprocess.Popen(cold_command(SCRIPT, *flags), text=True, **TO_US) as process:
        assert interrupt(process, at_step=5, signum=signal.SIGKILL) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
        if not left.stdout:
            return
        time.sleep(0.5)
    raise AssertionError(f"still running: {left.stdout}")
