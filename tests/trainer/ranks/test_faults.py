"""If this fails, a rank that dies or hangs leaves the others waiting for ever, or progress is lost:
by deaths, hangs, signals, restarts, lost machines and clock changes, as on real clusters.

`pytest tests/trainer/ranks/test_faults.py tests/trainer/saving -s` prints what was
tried and what survived.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.rank_group import RankGroup, record_steps, recorded_steps, run_ranks
from support.scripts import ROOT, script_environment, train_flags
from support.tiny_parts import make_records

from trainer.loop import train_loop

SCRIPT = "trainer/train_pretrain_vlm.py"
STATE = "checkpoints/pretrain_vlm_32_resume.pth"
LOST_S = 60  # the bar: nobody waits longer for a rank that is gone


@pytest.fixture
def data(tmp_path):
    return make_records(tmp_path / "data", num_records=60)


def flags(assets, folder, data, **options) -> list[str]:
    options = {
        "epochs": 1000,
        "batch_size": 2,
        "num_hidden_layers": 1,
        "save_interval": 2,
        "rank_timeout": 15,
    } | options
    return train_flags(assets, folder, *data, **options)


def steps_taken(folder: Path, ranks: int, name: str = "run") -> int:
    return len(recorded_steps(folder, name)) // ranks


def survived(what: str) -> None:
    print(f"\nsurvived: {what}")


def assert_nothing_runs(text: str) -> None:
    """No process names this folder on its command line any more, data workers included."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        left = subprocess.run(["pgrep", "-af", text], capture_output=True, text=True).stdout
        if not left:
            return
        time.sleep(0.5)
    raise AssertionError(f"still running: {left}")


def assert_ended(processes: list[int]) -> None:
    """None of them runs any more; who is dead but not yet waited for does not run."""
    deadline, left = time.monotonic() + 60, processes
    while left and time.monotonic() < deadline:
        shown = subprocess.run(
            ["ps", "-o", "pid=,stat=,args=", "-p", ",".join(map(str, left))],
            capture_output=True,
            text=True,
        ).stdout
        rows = [line.split(maxsplit=2) for line in shown.splitlines()]
        left = [int(pid) for pid, state, *_ in rows if not state.startswith("Z")]
        time.sleep(0.2)
    assert not left, shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "victim"),
    [
        pytest.param(signal.SIGKILL, 0, id="rank 0 dies"),
        pytest.param(signal.SIGSTOP, 2, id="rank 2 hangs"),
        pytest.param(signal.SIGKILL, 2, id="rank 2 dies", marks=pytest.mark.full),
        pytest.param(signal.SIGSTOP, 0, id="rank 0 hangs", marks=pytest.mark.full),
    ],
)
def test_rank_that_is_lost_ends_the_others(signum, victim, assets, tmp_path, data):
    argv = flags(assets, tmp_path, data, num_workers=1, rank_timeout=8)
    with RankGroup(argv, tmp_path, world_size=3, hook=(record_steps, tmp_path, "run")) as group:
        group.wait_for(lambda: steps_taken(tmp_path, 3) >= 3, "steps")
        group.kill(victim, signum=signum)
        started_s = time.monotonic()
        others = [rank for rank in range(3) if rank != victim]
        for rank in others:
            group.processes[rank].join(LOST_S)
            assert group.processes[rank].exitcode == 1, group.said()
            assert re.search(rf"error: .*rank {victim} \(", group.output(rank)), group.said()
        took_s = time.monotonic() - started_s
    survived(
        f"rank {victim} {'dies' if signum == signal.SIGKILL else 'hangs'}: the others name it "
        f"and leave after {took_s:.0f} s"
    )


@pytest.mark.slow
def test_nobody_waits_for_a_hanging_rank_when_another_dies(assets, tmp_path, data):
    # The collective fails at once, but with the rank that hangs others are still under way.
    argv = flags(assets, tmp_path, data, num_workers=1, rank_timeout=8)
    with RankGroup(argv, tmp_path, world_size=3, hook=(record_steps, tmp_path, "run")) as group:
        group.wait_for(lambda: steps_taken(tmp_path, 3) >= 3, "steps")
        processes = group.families()
        assert len(processes) >= 6  # each rank has a data worker
        group.kill(2, signum=signal.SIGSTOP)
        time.sleep(2)  # the others come to wait for it
        group.kill(1, signum=signal.SIGKILL)
        group.processes[0].join(LOST_S)
        assert group.processes[0].exitcode == 1, group.said()
        assert re.search(r"error: .*rank [12] \(", group.output(0)), group.said()
    assert_ended(processes)
    survived("one rank hangs, another dies: the third leaves")


@pytest.mark.slow
def test_rank_that_fails_is_named_with_its_error(assets, tmp_path, data):
    hook = (fail_at_step, 3, 1)
    with RankGroup(flags(assets, tmp_path, data), tmp_path, world_size=2, hook=hook) as group:
        assert group.wait(LOST_S) == [1, 1], group.said()
        assert re.search(r"rank 1 \(.*\) left: ValueError: the disk ate it", group.output(0))
    survived("an error on one rank: the other tells it")


def fail_at_step(step: int, rank: int) -> None:
    take = train_loop.optimizer_step

    def failing(run, *arguments):
        if run.progress.step == step and run.ranks.rank == rank:
            raise ValueError("the disk ate it")
        return take(run, *arguments)

    train_loop.optimizer_step = failing


def be_slow(rank: int, seconds: float) -> None:
    """One slow step on one rank, and slow disks on rank 0."""
    take, fsync = train_loop.optimizer_step, os.fsync

    def slow(run, *arguments):
        if run.progress.step == 1 and run.ranks.rank == rank:
            time.sleep(seconds)
        return take(run, *arguments)

    def slow_fsync(descriptor):
        time.sleep(seconds / 8)
        fsync(descriptor)

    train_loop.optimizer_step, os.fsync = slow, slow_fsync


@pytest.mark.slow
def test_slow_rank_is_not_taken_for_lost(assets, tmp_path, data):
    argv = flags(assets, tmp_path, data, epochs=1, batch_size=10, rank_timeout=4)
    run_ranks(argv, tmp_path, world_size=2, hook=(be_slow, 1, 8.0))
    survived("a rank that is slow for twice the limit, and a slow disk")


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_once(assets, tmp_path, data):
    for victim in (0, 1, 2):
        folder = tmp_path / str(victim)
        folder.mkdir()
        argv = flags(assets, folder, data, save_interval=100_000)
        with RankGroup(argv, folder, world_size=3, hook=(record_steps, folder, "run")) as group:
            group.wait_for(lambda f=folder: steps_taken(f, 3) >= 2, "steps")
            group.kill(victim, signum=signal.SIGTERM)
            assert group.wait(LOST_S) == [128 + signal.SIGTERM] * 3, group.said()
        state = torch.load(folder / STATE, weights_only=True)
        assert state["progress"]["step"] == steps_taken(folder, 3)  # of its last step
        assert state["world_size"] == len(state["rng"]) == 3 and "tracker" in state
        # Each epoch's end saves too, and within an epoch the stop.
        num_saves = state["progress"]["epoch"] + (state["progress"]["samples_in_epoch"] > 0)
        assert (folder / f"{STATE}.previous").exists() == (num_saves > 1)
    survived("SIGTERM to any one of three ranks: one state, and all leave with 143")


def jump(*_) -> None:
    """A wall clock that jumps by years, forwards and backwards, whenever it is read."""
    clock, dice = time.time, random.Random(0)
    time.time = lambda: clock() + dice.uniform(-1, 1) * 3e8


@pytest.mark.slow
def test_clock_that_jumps_changes_nothing(assets, tmp_path, data):
    states = []
    for name, hook in (("steady", None), ("jumping", (jump,))):
        argv = flags(assets, tmp_path / name, data, epochs=1, batch_size=5)
        run_ranks(argv, tmp_path, world_size=2, hook=hook, name=name)
        if name == "jumping":  # files from the future, too
            path = tmp_path / name / STATE
            os.utime(path, (0, 0))
            os.utime(f"{path}.previous", (4e9, 4e9))
        argv = flags(assets, tmp_path / name, data, epochs=2, batch_size=5, from_resume=1)
        run_ranks(argv, tmp_path, world_size=2, hook=hook, name=name)
        states.append(torch.load(tmp_path / name / STATE, weights_only=True))
    assert states[0]["progress"] == states[1]["progress"]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
    survived("a clock that jumps by up to ten years at every look")


@contextlib.contextmanager
def torchrun(argv: list[str], *options: str, prefix=(), env=None):
    """torchrun with the script, in a process group of its own; killed at the end."""
    command = [
        *prefix,
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        str(ROOT / SCRIPT),
        *argv,
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=script_environment() | (env or {}),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def read_until(process, pattern: str) -> str:
    """Output up to the first line that fits."""
    seen = ""
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f"no {pattern!r} in:\n{seen}")


def workers_of(process) -> list[int]:
    """The ranks of a launcher, in order of start."""
    words = ["pgrep", "-P", str(process.pid), "-f", SCRIPT]
    listed = subprocess.run(words, capture_output=True, text=True)
    return sorted(map(int, listed.stdout.split()))


def assert_same_model(left: Path, right: Path) -> None:
    states = [torch.load(folder / STATE, weights_only=True) for folder in (left, right)]
    assert states[0]["progress"] == states[1]["progress"]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_goes_on_from_its_own_state(assets, tmp_path, data):
    options = {"epochs": 3, "num_workers": 1}
    run_ranks(flags(assets, tmp_path / "whole", data, **options), tmp_path, world_size=2)
    argv = flags(assets, tmp_path / "cut", data, **options)
    launch = ("--standalone", "--nproc_per_node", "2", "--max-restarts", "2")
    with torchrun(argv, *launch) as process:
        read_until(process, r"Epoch:\[1/3\]\(6/")
        os.kill(random.choice(workers_of(process)), signal.SIGKILL)
        said = process.stdout.read()
        assert process.wait(LOST_S) == 0, said
    assert "this launch was restarted: it goes on from its own state" in said
    assert re.search(r"resumed .* at step \d+", said), said
    assert_same_model(tmp_path / "whole", tmp_path / "cut")
    # A new launch is not a restart: it leaves that state alone and says so.
    again = flags(assets, tmp_path / "cut", data, **(options | {"epochs": 1}))
    with torchrun(again, *launch) as process:
        assert "is the state of an earlier run" in process.stdout.read()
    assert_nothing_runs(str(tmp_path))
    survived("kill -9 of a rank under torchrun --max-restarts, to the bit")


@pytest.mark.full
def test_launcher_that_is_killed_leaves_no_orphan(assets, tmp_path, data):
    argv = flags(assets, tmp_path, data, num_workers=2)
    with torchrun(argv, "--standalone", "--nproc_per_node", "2") as process:
        read_until(process, r"Epoch:\[1/1000\]\(6/")
        process.kill()
        assert_nothing_runs(str(tmp_path / "out"))
    survived("kill -9 of torchrun: its ranks and their data workers leave")


@pytest.mark.full
def test_four_then_two_then_three_ranks(assets, tmp_path, data):
    """Under torchrun, each killed in the middle: every sample of the run once."""
    samples = 0
    for ranks in (4, 2, 3):
        argv = flags(assets, tmp_path, data, from_resume=1, save_interval=1)
        launch = ("--standalone", "--nproc_per_node", str(ranks))
        with torchrun(argv, *launch) as process:
            said = read_until(process, r"^Epoch:")
            said += "".join(read_until(process, r"^Epoch:") for _ in range(4))
            process.send_signal(signal.SIGTERM)
            said += process.stdout.read()
        assert samples == 0 or "the order of the samples goes on" in said
        state = torch.load(tmp_path / STATE, weights_only=True)
        assert state["progress"]["samples"] > samples and state["world_size"] == ranks
        samples = state["progress"]["samples"]
    survived("4, then 2, then 3 ranks under torchrun")


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def two_machines():
    """Two network namespaces joined by a cable, as (name, address, interface)."""
    token = f"mm{os.getpid() % 10000}"
    machines = [
        (f"{token}{side}", f"10.77.{os.getpid() % 250}.{i}", f"{token}v{side}")
        for i, side in ((1, "a"), (2, "b"))
    ]
    try:
        for name, _, _ in machines:
            command("ip", "netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not permitted here ({error})")
    (left, _, left_cable), (right, _, right_cable) = machines
    command(
        "ip",
        "link",
        "add",
        left_cable,
        "netns",
        left,
        "type",
        "veth",
        "peer",
        "name",
        right_cable,
        "netns",
        right,
    )
    for name, address, cable in machines:
        command("ip", "-n", name, "addr", "add", f"{address}/24", "dev", cable)
        for device in (cable, "lo"):
            command("ip", "-n", name, "link", "set", device, "up")
    yield machines
    for name, _, _ in machines:
        subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.full
def test_machine_that_is_lost(assets, tmp_path, data, two_machines):
    """Two nodes of two ranks; the cable of the second is cut: the first goes on alone."""
    (first, address, _), (second, _, cable) = two_machines
    argv = flags(assets, tmp_path, data, epochs=3, batch_size=1)

    def node(name, own_address, interface):
        options = (
            *"--nnodes 1:2 --nproc_per_node 2 --max-restarts 3 --rdzv_backend c10d".split(),
            "--rdzv_endpoint",
            f"{address}:29477",
            "--rdzv_id",
            f"test{os.getpid()}",
            "--local_addr",
            own_address,
            "--rdzv_conf",
            f"is_host={int(own_address == address)}",
        )
        env = {"GLOO_SOCKET_IFNAME": interface}
        return torchrun(argv, *options, prefix=("ip", "netns", "exec", name), env=env)

    with node(*two_machines[0]) as survivor, node(*two_machines[1]):
        said = read_until(survivor, r"4 rank\(s\)")
        said += read_until(survivor, r"^Epoch:\[1/3\]\(6/")
        command("ip", "-n", second, "link", "set", cable, "down")
        started_s = time.monotonic()
        said += read_until(survivor, r"error: .*has been silent for")
        took_s = time.monotonic() - started_s
        assert took_s < LOST_S
        said += read_until(survivor, r"goes on from its own state")
        said += survivor.stdout.read()
        assert survivor.wait(LOST_S) == 0, said
    assert "2 rank(s)" in said and "the order of the samples goes on" in said
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert state["progress"]["samples"] == 180 and state["world_size"] == 2
    survived(f"a machine lost, noticed after {took_s:.0f} s: {first} goes on by itself")
