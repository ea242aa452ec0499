"""If this fails, a run that is stopped by anything but SIGKILL loses its progress, hangs, or does
not name the cause. Ranks are real processes, and what happens to them and to their data workers is
real too.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from support.rank_group import RankGroup, record_steps, recorded_steps
from support.scripts import train_flags
from support.tiny_parts import make_records

from dataset.lm_dataset import VLMDataset
from trainer.run import build

STATE = "checkpoints/pretrain_vlm_32_resume.pth"
BAD = 20  # the sample that some hooks wait for


@pytest.fixture
def data(tmp_path):
    return make_records(tmp_path / "data", num_records=60)


def flags(assets, folder, data, **options) -> list[str]:
    options = {
        "epochs": 1000,
        "batch_size": 2,
        "num_hidden_layers": 1,
        "num_workers": 1,
        "rank_timeout": 600,
    } | options
    return train_flags(assets, folder, *data, **options)


def prepare(folder: Path) -> None:
    """Record the steps; data workers are forked, as they are by default in training on Linux."""
    multiprocessing.set_start_method("fork", force=True)
    record_steps(folder, "run")


class Spoilt(VLMDataset):
    """One of its samples has an effect, in whatever process makes it."""

    effect, folder = None, None

    def __getitem__(self, index):
        if index == BAD and self.effect is not None:
            (self.folder / "reached").touch()
            self.effect()
        return super().__getitem__(index)


def spoil(effect, folder: Path, rank: int = 0) -> None:
    """Have `Spoilt` data on a rank; steps are recorded."""
    prepare(folder)

    def make(*arguments, **options):
        dataset = Spoilt(*arguments, **options)
        if int(os.environ["RANK"]) == rank:
            dataset.effect, dataset.folder = effect, folder
        return dataset

    build.VLMDataset = make


def run_out_of_memory() -> None:
    raise MemoryError("no room for a picture")


def hang() -> None:
    while True:
        time.sleep(0.1)


def saved_step(folder: Path) -> int:
    return torch.load(folder / STATE, weights_only=True)["progress"]["step"]


def steps_of(folder: Path, ranks: int = 1) -> int:
    return len(recorded_steps(folder, "run")) // ranks


def assert_saved(group: RankGroup, folder: Path) -> None:
    """As of the last step that was taken."""
    assert saved_step(folder) == steps_of(folder, len(group.processes)) > 0, group.said()


def assert_ended(processes: list[int]) -> None:
    for pid in processes:
        for _ in range(100):
            try:
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    break
            except OSError:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"process {pid} still runs")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_error_of_any_kind_in_a_sample_is_named_and_all_ranks_save(
    num_workers, assets, tmp_path, data
):
    argv = flags(assets, tmp_path, data, num_workers=num_workers)
    hook = (spoil, run_out_of_memory, tmp_path, 1)
    with RankGroup(argv, tmp_path, world_size=2, hook=hook) as group:
        assert group.wait(timeout_s=120) == [1, 1], group.said()
        words = f"data_0.jsonl:{BAD + 1}: MemoryError: no room for a picture; saved at step"
        assert f"error: rank 1: {words}" in group.output(0), group.said()
        assert f"rank 1: error: {words}" in group.output(1)
        assert "Traceback" not in group.output(0) + group.output(1)
        assert_saved(group, tmp_path)


@pytest.mark.slow
def test_worker_that_hangs_is_named(assets, tmp_path, data):
    argv = flags(assets, tmp_path, data, rank_timeout=6)
    with RankGroup(argv, tmp_path, world_size=1, hook=(spoil, hang, tmp_path)) as group:
        group.wait_for((tmp_path / "reached").exists, "the sample")
        processes = group.families()
        assert group.wait(timeout_s=60) == [1], group.said()
        assert f"hanging data worker(s): {processes[1]} at data_0.jsonl:{BAD + 1}" in group.output()
        assert_saved(group, tmp_path)
    assert_ended(processes)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_sigterm_ends_the_wait_for_a_sample(num_workers, assets, tmp_path, data):
    argv = flags(assets, tmp_path, data, num_workers=num_workers)
    with RankGroup(argv, tmp_path, world_size=1, hook=(spoil, hang, tmp_path)) as group:
        group.wait_for((tmp_path / "reached").exists, "the sample")
        processes = group.families()
        group.kill(signum=signal.SIGTERM)
        assert group.wait(timeout_s=60) == [128 + signal.SIGTERM], group.said()
        assert_saved(group, tmp_path)
    assert_ended(processes)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_worker_that_is_killed_or_stopped(signum, assets, tmp_path, data):
    argv = flags(assets, tmp_path, data, rank_timeout=6)
    with RankGroup(argv, tmp_path, world_size=1, hook=(prepare, tmp_path)) as group:
        group.wait_for(lambda: steps_of(tmp_path) > 2, "steps")
        worker = None
        while worker is None:  # each epoch has its own
            worker = next(iter(group.families()[1:]), None)
        os.kill(worker, signum)
        assert group.wait(timeout_s=60) == [1], group.said()
        how = f"{worker} was killed by SIGKILL" if signum == signal.SIGKILL else "no data for"
        assert how in group.output() and f"{worker}" in group.output(), group.said()
        assert_saved(group, tmp_path)
    assert_ended([worker])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "SIGHUP",
        "SIGUSR1",
        *(pytest.param(n, marks=pytest.mark.full) for n in ("SIGUSR2", "SIGXCPU")),
    ],
)
def test_signals_of_terminals_and_schedulers_save(name, assets, tmp_path, data):
    signum = getattr(signal, name)
    with RankGroup(
        flags(assets, tmp_path, data), tmp_path, world_size=1, hook=(prepare, tmp_path)
    ) as group:
        group.wait_for(lambda: steps_of(tmp_path) > 2, "steps")
        for pid in reversed(group.families()):  # a terminal signals the whole group
            os.kill(pid, signum)
        assert group.wait(timeout_s=60) == [128 + signum], group.said()
        assert f"{name}: will save and leave" in group.output()
        assert_saved(group, tmp_path)


def ignore_hangup(folder: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    prepare(folder)


@pytest.mark.slow
def test_run_under_nohup_outlives_its_terminal(assets, tmp_path, data):
    argv = flags(assets, tmp_path, data)
    with RankGroup(argv, tmp_path, world_size=1, hook=(ignore_hangup, tmp_path)) as group:
        group.wait_for(lambda: steps_of(tmp_path) > 2, "steps")
        group.kill(signum=signal.SIGHUP)
        steps = steps_of(tmp_path)
        group.wait_for(lambda: steps_of(tmp_path) > steps + 5, "more steps")


def read_some_lines(folder: Path, count: int) -> None:
    """The output goes through a pipe whose reader leaves after some lines, as `| head` does."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(writer)

    def read():
        with open(reader) as lines:
            for _ in range(count):
                (folder / "head.txt").open("a").write(next(lines))

    threading.Thread(target=read, daemon=True).start()
    prepare(folder)


@pytest.mark.slow
def test_reader_of_the_output_that_leaves_ends_the_run_saved(assets, tmp_path, data):
    argv = flags(assets, tmp_path, data)
    with RankGroup(argv, tmp_path, world_size=1, hook=(read_some_lines, tmp_path, 14)) as group:
        assert group.wait(timeout_s=60) == [128 + signal.SIGPIPE], group.said()
        assert "nobody reads the output any more: will save and leave" in group.output()
        assert "Traceback" not in group.output()
        assert "Epoch:[1/1000]" in (tmp_path / "head.txt").read_text()
        assert_saved(group, tmp_path)


def write_to_a_full_disk() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)


@pytest.mark.slow
def test_full_disk_costs_lines_and_not_the_run(assets, tmp_path, data):
    argv = flags(assets, tmp_path, data, epochs=1, num_workers=0)
    with RankGroup(argv, tmp_path, world_size=1, hook=(write_to_a_full_disk,)) as group:
        assert group.wait(timeout_s=60) == [0], group.said()
        assert group.output().count("lines are lost, the output cannot be written") == 1
    assert saved_step(tmp_path) == 30


def be_slow_in_validation(folder: Path) -> None:
    """From its third sample on, so that a signal comes in the middle."""
    prepare(folder)
    make = VLMDataset.__getitem__

    def slow(self, index):
        if self.data_path.name == "data_1.jsonl" and index > 2:
            (folder / "reached").touch()
            time.sleep(0.2)
        return make(self, index)

    VLMDataset.__getitem__ = slow


@pytest.mark.slow
def test_sigterm_to_one_rank_ends_validation(assets, tmp_path, data):
    val_data, val_images = make_records(tmp_path / "val", num_records=2000, seed=1)
    argv = flags(
        assets, tmp_path, data, val_data_path=val_data, val_images_path=val_images, num_workers=0
    )
    hook = (be_slow_in_validation, tmp_path)
    with RankGroup(argv, tmp_path, world_size=2, hook=hook) as group:
        group.wait_for((tmp_path / "reached").exists, "validation")
        group.kill(1, signum=signal.SIGTERM)
        assert group.wait(timeout_s=60) == [128 + signal.SIGTERM] * 2, group.said()
        assert steps_of(tmp_path, 2) == 15  # one epoch
    progress = torch.load(tmp_path / STATE, weights_only=True)["progress"]
    assert progress["epoch"] == 0 and progress["samples_in_epoch"] == 60  # still to be validated
    metrics = (tmp_path / "out" / "pretrain_vlm_32_metrics.jsonl").read_text().splitlines()
    assert not any("val_loss" in json.loads(line) for line in metrics)


def hang_in_preflight(folder: Path, rank: int) -> None:
    from trainer.run import preflight

    def check(*_, **__):
        (folder / os.environ["RANK"]).touch()
        if int(os.environ["RANK"]) == rank:
            hang()

    preflight.check_records = check


@pytest.mark.slow
def test_sigterm_before_training_ends_the_program_at_once(assets, tmp_path, data):
    argv = flags(assets, tmp_path, data, rank_timeout=6)
    hook = (hang_in_preflight, tmp_path, 1)
    with RankGroup(argv, tmp_path, world_size=2, hook=hook) as group:
        group.wait_for(lambda: all((tmp_path / r).exists() for r in "01"), "preflight")
        group.kill(1, signum=signal.SIGTERM)
        assert group.wait(timeout_s=40) == [1, -signal.SIGTERM], group.said()
        assert "rank 1 (" in group.output(0)  # the other one misses it
    assert not (tmp_path / STATE).exists()
