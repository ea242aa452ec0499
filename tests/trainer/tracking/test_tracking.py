"""If this fails, SwanLab, Weights & Biases or TensorBoard misses figures of a run, or stops, slows
or outlives it.
"""

import json
import os
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.rank_group import RankGroup, run_ranks
from support.scripts import run_script, train_flags
from support.tiny_parts import make_records

from trainer import train_pretrain_vlm

SCRIPT = "trainer/train_pretrain_vlm.py"
PACKAGES = ("swanlab", "wandb", "tensorboard")
# A tracker in SwanLab's place that writes down what it is told, and misbehaves if asked to.
FAKE = """
import json, os, signal, sys, time
conduct, record = os.environ["FAKE_CONDUCT"], os.environ["FAKE_RECORD"]
def note(**what):
    with open(record, "a") as file:
        print(json.dumps(what | {"pid": os.getpid()}), file=file)
class Settings:
    def __init__(self, **_): pass
def init(**options):
    options.pop("settings")
    note(init=options)
    if conduct == "refuse":
        raise RuntimeError("no API key\\nmore")
    if conduct == "leave":
        sys.exit("not configured")
    while conduct == "wait":
        time.sleep(1)
def log(figures, step):
    note(log=figures, step=step)
    if step == 2 and conduct == "fail":
        raise ConnectionError("no route to host")
    if step == 2 and conduct == "die":
        os.kill(os.getpid(), signal.SIGKILL)
def finish(**options):
    note(finish=options)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts the fake in SwanLab's place; returns how to set its conduct and read its record."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "swanlab.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("FAKE_RECORD", str(folder / "record.jsonl"))
    monkeypatch.setenv("FAKE_CONDUCT", "well")
    monkeypatch.delenv("SWANLAB_MODE", raising=False)

    def read(key: str) -> list:
        record = folder / "record.jsonl"
        lines = record.read_text().splitlines() if record.exists() else []
        return [r[key] for r in map(json.loads, lines) if key in r]

    return read


@pytest.fixture
def data(tmp_path):
    return make_records(tmp_path / "data", num_records=12)


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in next((folder / "out").glob("*.jsonl")).open()]


def flags_of(assets, out, data, **flags) -> list[str]:
    return train_flags(assets, out, *data, **{"use_wandb": 1, "batch_size": 2} | flags)


def test_figures_reach_the_tracker_and_the_end_too(assets, tmp_path, data, fake):
    assert train_pretrain_vlm.main(flags_of(assets, tmp_path, data, wandb_run_name="n")) == 0
    (init,) = fake("init")
    assert init["name"] == "n" and init["project"] == "MiniMind-V-Pretrain"
    assert init["mode"] == "online" and init["config"]["batch_size"] == 2
    wanted = [{k: v for k, v in f.items() if v is not None} for f in logged(tmp_path)]
    assert fake("log") == wanted and fake("step") == [f["step"] for f in wanted]
    assert fake("finish") == [{"state": "success"}]


@pytest.mark.parametrize(
    ("conduct", "message"),
    [
        ("refuse", "SwanLab did not start and is left out from here on: no API key; run `swanlab "
                   "login`, or choose --tracker_mode offline"),
        ("leave", "SwanLab did not start and is left out from here on: not configured"),
        ("fail", "SwanLab failed and is left out from here on: no route to host"),
        ("die", "SwanLab ended by itself (status -9) and is left out from here on"),
        ("wait", "SwanLab did not finish within 1 s and is left behind"),
    ],
)  # fmt: skip
def test_tracker_that_fails_never_stops_training(
    conduct, message, assets, tmp_path, data, fake, monkeypatch, capfd
):
    monkeypatch.setenv("FAKE_CONDUCT", conduct)
    if conduct == "wait":
        monkeypatch.setattr("trainer.tracking.trackers.PATIENCE_S", 1)
    assert train_pretrain_vlm.main(flags_of(assets, tmp_path, data)) == 0
    error = capfd.readouterr().err
    assert error.count("warning: SwanLab") == 1 and message in error
    assert [f["step"] for f in logged(tmp_path)] == list(range(1, 7))


def test_resumed_run_is_the_same_experiment_online_and_another_with_its_name_offline(
    assets, tmp_path, data, fake
):
    assert train_pretrain_vlm.main(flags_of(assets, tmp_path, data, wandb_run_name="n")) == 0
    resume = {"epochs": 2, "from_resume": 1, "wandb_run_name": "n"}
    assert train_pretrain_vlm.main(flags_of(assets, tmp_path, data, **resume)) == 0
    resume |= {"epochs": 3, "tracker_mode": "offline"}
    assert train_pretrain_vlm.main(flags_of(assets, tmp_path, data, **resume)) == 0
    first, online, offline = fake("init")
    assert first["resume"] == online["resume"] == "allow" and first["id"] == online["id"]
    assert online["name"] == "n" and offline["name"] == "n (from step 12)"
    assert "id" not in offline and offline["config"]["resumed_from"] == first["id"]
    assert fake("step") == list(range(1, 19)) == [f["step"] for f in logged(tmp_path)]


@pytest.mark.slow
def test_killed_run_leaves_no_tracker_behind_and_only_one_rank_talks(assets, tmp_path, data, fake):
    flags = flags_of(assets, tmp_path, data, epochs=100_000)
    environment = {k: os.environ[k] for k in ("PYTHONPATH", "FAKE_RECORD", "FAKE_CONDUCT")}
    hook = (set_environment, environment)
    with RankGroup(flags, tmp_path, world_size=2, hook=hook) as group:
        group.wait_for(lambda: len(fake("step")) > 5, "a few steps")
        group.kill()
    deadline = time.monotonic() + 60
    while not fake("finish") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [f["state"] for f in fake("finish")] == ["crashed"]
    assert len(fake("init")) == 1 and len(set(fake("pid"))) == 1
    assert len(fake("step")) == len(set(fake("step")))


def set_environment(values: dict[str, str]) -> None:
    os.environ.update(values)


def interrupt_and_resume(flags: list[str], folder) -> None:
    """Ctrl-C after a few steps, then on to the end; the tracker's files go below `folder`."""
    options = {"world_size": 1, "hook": (os.chdir, folder)}
    with RankGroup(flags, folder, name="cut", **options) as group:
        group.wait_for(lambda: "Epoch:[2/12]" in group.output(), "epoch 2")
        group.kill(0, signum=signal.SIGINT)
        assert group.wait() == [128 + signal.SIGINT], "the tracker took the signal over"
    run_ranks([*flags, "--from_resume", "1"], folder, name="resumed", **options)


def wandb_steps(path: Path) -> list[int]:
    """The steps in a .wandb file: blocks of 32 KiB with pieces of protobuf records, each behind
    its checksum (4 bytes), length (2) and kind (1: 1 and 4 end a record)."""
    from wandb.proto import wandb_internal_pb2

    data, position, record, steps = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            message = wandb_internal_pb2.Record.FromString(record)
            steps += [message.history.step.num] if message.HasField("history") else []
            record = b""
    return steps


def need(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -r requirements-dev.txt")


@pytest.mark.slow
def test_tensorboard_goes_on_in_the_same_curve(assets, tmp_path, data):
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = train_flags(assets, tmp_path, *data, epochs=12, tracker="tensorboard")
    interrupt_and_resume(flags, tmp_path)
    (folder,) = (tmp_path / "out" / "tensorboard").iterdir()
    curves = EventAccumulator(str(folder))
    curves.Reload()
    for key in ("loss", "lr", "grad_norm"):
        shown = {e.step: e.value for e in curves.Scalars(key)}
        wanted = {f["step"]: f[key] for f in logged(tmp_path)}
        assert shown == pytest.approx(wanted, rel=1e-6) and len(wanted) == 36
        assert len(curves.Scalars(key)) == 36  # none twice


@pytest.mark.slow
def test_swanlab_offline_records_without_a_login(assets, tmp_path, data):
    need("swanlab")
    flags = train_flags(assets, tmp_path, *data, epochs=12, use_wandb=1, tracker_mode="offline")
    interrupt_and_resume(flags, tmp_path)
    first, second = sorted((tmp_path / "swanlog").glob("run-*"))
    configs = [(f / "files" / "config.yaml").read_text() for f in (first, second)]
    assert "resumed_from" not in configs[0] and first.name.split("-")[-1] in configs[1]
    assert all(next(f.glob("*.swanlab")).stat().st_size > 1000 for f in (first, second))


@pytest.mark.slow
def test_wandb_offline_keeps_the_id(assets, tmp_path, data):
    need("wandb")
    flags = train_flags(assets, tmp_path, *data, epochs=12, tracker="wandb", tracker_mode="local")
    interrupt_and_resume(flags, tmp_path)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({f.name.split("-")[-1] for f in folders}) == 1
    steps = [step for f in folders for step in wandb_steps(next(f.glob("*.wandb")))]
    assert steps == [f["step"] for f in logged(tmp_path)] == list(range(1, 37))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["swanlab", "wandb"])
def test_without_a_login_training_goes_on_and_says_how_to_log_in(package, assets, tmp_path, data):
    need(package)
    flags = train_flags(assets, tmp_path, *data, tracker=package, tracker_mode="online")
    nobody = {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
        "SWANLAB_API_KEY": "",
        "SWANLAB_SAVE_DIR": str(tmp_path),
        "WANDB_API_KEY": "",
    }
    shown = run_script(SCRIPT, *flags, cwd=tmp_path, env=nobody)
    assert shown.stderr.count("did not start and is left out from here on") == 1, shown.stderr
    assert f"run `{package} login`, or choose --tracker_mode offline" in shown.stderr
    assert len(logged(tmp_path)) == 3


@pytest.mark.parametrize("package", PACKAGES)
def test_missing_package_is_one_clear_line(package, assets, tmp_path, data, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, package, None)
    flags = train_flags(assets, tmp_path, *data, tracker=package)
    assert train_pretrain_vlm.main(flags) == 1
    wanted = f"error: --tracker {package} needs the package {package}: pip install {package}\n"
    assert capfd.readouterr().err == wanted
    assert train_pretrain_vlm.main([*flags, "--use_wandb", "0"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_disabled_mode_writes_nothing(package, assets, tmp_path, data):
    need(package)
    flags = train_flags(assets, tmp_path, *data, tracker=package, tracker_mode="disabled")
    shown = run_ranks(flags, tmp_path, world_size=1, hook=(os.chdir, tmp_path))
    assert "left out" not in shown
    written = {p.name for p in tmp_path.iterdir()} | {p.name for p in (tmp_path / "out").iterdir()}
    assert not written & {"tensorboard", "swanlog", "wandb"}
