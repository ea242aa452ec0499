"""If this fails, a save that is cut off, a damaged file or a full disk costs a user the training
state.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from support.rank_group import CONTEXT, RankGroup, record_steps, recorded_steps
from support.scripts import train_flags
from support.tiny_parts import make_records, make_tower

from model.weights.metadata import read_metadata, weight_id
from model.weights.saving import save_weights
from trainer import benchmark_saving, train_pretrain_vlm
from trainer.saving import state_file
from trainer.saving.background_writer import Snapshot
from trainer.saving.state_file import fault_of, old_path, previous_path
from trainer.trainer_utils import vlm_checkpoint

IDENTITY = {"stage": "test"}


def state_number(step: int) -> dict:
    return {"model": {"w": torch.full((500,), float(step))}, "progress": {"step": step}}


def save_number(folder: Path, step: int, *, is_first: bool = False) -> None:
    """State and weight, as a run writes them."""
    state = state_number(step)
    vlm_checkpoint(folder / "x_resume.pth", state, identity=IDENTITY, is_first=is_first)
    about = {"config": {"hidden_size": 8}, "step": step}
    save_weights(state["model"], folder / "x.pth", about)


def kill_at(moment: int) -> None:
    """Die by SIGKILL at the nth moment of a save: before and after each write, fsync, link,
    rename and removal; the folder's fsync included."""
    count = [0]

    def pass_by():
        if count[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    def watched(function):
        def call(*args, **kwargs):
            pass_by()
            result = function(*args, **kwargs)
            pass_by()
            return result

        return call

    for name in ("fsync", "replace", "link", "unlink"):
        setattr(os, name, watched(getattr(os, name)))
    opened = open

    class Watched:
        """A file that is written half, then the other half."""

        def __init__(self, file):
            self._file = file

        def write(self, content):
            content = bytes(content)
            pass_by()
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            pass_by()
            self._file.write(content[len(content) // 2 :])
            return len(content)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

    def open_watched(path, mode="r", **options):
        file = opened(path, mode, **options)
        return Watched(file) if "w" in mode else file

    __builtins__["open"] = open_watched


def save_and_die(folder: Path, moment: int, is_first: bool) -> None:
    kill_at(moment)
    save_number(folder, 3, is_first=is_first)


def die_at_every_moment(folder: Path, is_first: bool, results) -> None:
    """In a process of its own: fork, die in the middle of the third save, look what is left."""
    saved = folder / "saved"
    saved.mkdir()
    for step in (1, 2):
        save_number(saved, step)
    moment, status = 0, -signal.SIGKILL
    while status:
        work = folder / f"at{moment}"
        shutil.copytree(saved, work)
        child = os.fork()
        if not child:
            save_and_die(work, moment, is_first)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        state = vlm_checkpoint(work / "x_resume.pth", identity=IDENTITY)
        weight = torch.load(work / "x.pth", weights_only=True)["w"]
        results.put(
            (
                moment,
                status,
                state["progress"]["step"],
                float(state["model"]["w"][0]),
                float(weight[0]),
                read_metadata(work / "x.pth")["step"],
            )
        )
        shutil.rmtree(work)
        moment += 1
    results.put(None)


def test_state_of_another_run_is_refused_by_what_differs(tmp_path):
    path = tmp_path / "x_resume.pth"
    identity = {"model": {"hidden_size": 32}, "trained parameters": ["a", "b"]}
    vlm_checkpoint(path, state_number(1), identity=identity, is_first=True)
    changes = (
        ({"model": {"hidden_size": 32, "projector": "mlp"}}, "{'projector': 'default'}"),
        ({"trained parameters": ["a"]}, "'with 1 more, such as b', this run's is 'without them'"),
    )
    for change, says in changes:
        with pytest.raises(ValueError, match="cannot be resumed") as caught:
            vlm_checkpoint(path, identity=identity | change)
        assert says in str(caught.value) and "32" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [False, True], ids=["own state", "over another run's"])
def test_kill_at_every_moment_of_a_save(is_first, tmp_path):
    results = CONTEXT.Queue()
    process = CONTEXT.Process(target=die_at_every_moment, args=(tmp_path, is_first, results))
    process.start()
    moments = list(iter(lambda: results.get(timeout=300), None))
    process.join()
    for moment, status, step, inside, weight, said in moments:
        assert status in (-signal.SIGKILL, 0)
        assert step in (2, 3) and inside == step, f"moment {moment}"
        assert weight in (2, 3) and said == weight, f"moment {moment}: weight and description"
        assert weight <= step, f"moment {moment}: the state is written first"
    assert len(moments) > 40 and moments[0][2] == 2 and moments[-1][1:4] == (0, 3, 3)
    assert {step for _, _, step, _, _, _ in moments} == {2, 3}
    print(f"\nkilled at {len(moments) - 1} moments of a save: a whole state and weight each time")


def test_truncated_state_falls_back_to_the_one_before(tmp_path, capsys):
    path = tmp_path / "x_resume.pth"
    for step in (1, 2):
        save_number(tmp_path, step)
    whole, dice = path.read_bytes(), random.Random(0)
    for size in {0, 1, len(whole) - 1} | {dice.randrange(len(whole)) for _ in range(210)}:
        path.write_bytes(whole[:size])
        assert vlm_checkpoint(path, identity=IDENTITY)["progress"]["step"] == 1
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "going on from the state before it" in said
    path.write_bytes(whole)
    assert vlm_checkpoint(path, identity=IDENTITY)["progress"]["step"] == 2
    assert capsys.readouterr().out == ""


def test_single_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "x_resume.pth"
    save_number(tmp_path, 2)
    content = bytearray(path.read_bytes())
    spot = content.index(torch.full((4,), 2.0).numpy().tobytes())
    content[spot + 2] ^= 1
    path.write_bytes(content)
    assert fault_of(path).startswith("is damaged")
    with pytest.raises(ValueError, match="no whole one before it; delete it"):
        vlm_checkpoint(path, identity=IDENTITY)
    assert path.read_bytes() == bytes(content)  # nothing to go on from: nothing is moved


def test_new_run_keeps_what_an_earlier_one_has_left_whole(tmp_path):
    path = tmp_path / "x_resume.pth"
    for step in (1, 2):
        save_number(tmp_path, step)
    path.write_bytes(b"torn")
    assert vlm_checkpoint(path, identity=IDENTITY)["progress"]["step"] == 1  # sets it aside
    save_number(tmp_path, 7, is_first=True)
    assert vlm_checkpoint(old_path(path), identity=IDENTITY)["progress"]["step"] == 1
    assert vlm_checkpoint(path, identity=IDENTITY)["progress"]["step"] == 7
    assert not previous_path(path).exists()


def test_damaged_state_never_takes_the_place_of_a_whole_one(tmp_path):
    path = tmp_path / "x_resume.pth"
    for step in (1, 2):
        save_number(tmp_path, step)
    path.write_bytes(b"torn")
    assert vlm_checkpoint(path, identity=IDENTITY)["progress"]["step"] == 1
    save_number(tmp_path, 2)
    assert fault_of(previous_path(path)) is None and fault_of(path) is None
    assert not list(tmp_path.glob(".*.tmp"))


def test_state_is_copied_where_links_are_not_to_be_had(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        save_number(tmp_path, step)
    path = tmp_path / "x_resume.pth"
    assert vlm_checkpoint(path, identity=IDENTITY)["progress"]["step"] == 3
    assert vlm_checkpoint(previous_path(path), identity=IDENTITY)["progress"]["step"] == 2


def test_former_description_is_found_when_a_save_stops_before_the_weight(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    save_weights({"w": torch.zeros(3)}, path, {"config": {}, "step": 1})
    former = weight_id(path)

    def stop(*_):
        raise KeyboardInterrupt

    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: stop() if b == path else replace(a, b))
    with pytest.raises(KeyboardInterrupt):
        save_weights({"w": torch.ones(3)}, path, {"config": {}, "step": 2})
    assert weight_id(path) == former and read_metadata(path)["step"] == 1
    assert json.loads(path.with_suffix(".json").read_text())["step"] == 2


def test_snapshot_is_a_copy_that_keeps_ties():
    weight = torch.ones(3)
    state = {"a": weight, "b": weight, "c": [torch.tensor(2.0), (1, "x")], "d": weight[:2]}
    snapshot = Snapshot()
    first = snapshot.copy(state)
    assert first["a"] is first["b"] and first["d"].shape == (2,)
    weight.fill_(5)
    assert first["a"].tolist() == [1, 1, 1] and first["c"] == [torch.tensor(2.0), (1, "x")]
    again = snapshot.copy(state)
    assert again["a"].data_ptr() == first["a"].data_ptr() and again["a"].tolist() == [5, 5, 5]


def test_no_memory_for_a_copy_is_said(assets, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("trainer.saving.run_state.spare_bytes", lambda: 1000)
    data = make_records(tmp_path / "data")
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, *data, save_interval=2)) == 0
    assert capfd.readouterr().err.count("training waits while it saves") == 1
    assert fault_of(next((tmp_path / "checkpoints").glob("*_resume.pth"))) is None


def test_training_goes_on_while_a_save_is_slow(assets, tmp_path, monkeypatch, capfd):
    """The write of step 2 ends only after step 5 was logged."""
    step_5, write = threading.Event(), state_file.staged_write

    def slow(path, write_content):
        assert step_5.wait(timeout=60), "training waits for the save"
        return write(path, write_content)

    monkeypatch.setattr(state_file, "staged_write", slow)
    monkeypatch.setattr("trainer.loop.train_loop.report_estimate", lambda _run: step_5.set())
    data = make_records(tmp_path / "data")
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, *data, save_interval=4)) == 0


def test_weight_of_another_step_is_mended_when_resuming(assets, tmp_path, capfd):
    data = make_records(tmp_path / "data")
    argv = train_flags(assets, tmp_path, *data)
    assert train_pretrain_vlm.main(argv) == 0
    weight = tmp_path / "out" / "pretrain_vlm_32.pth"
    content = weight.read_bytes()
    about = json.loads(weight.with_suffix(".json").read_text()) | {"step": 3}
    weight.with_suffix(".json").write_text(json.dumps(about))
    weight.write_bytes(b"torn")
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 0
    assert "was not of this step and is made anew" in capfd.readouterr().out
    assert read_metadata(weight)["step"] == 6
    before, after = tmp_path / "before.pth", torch.load(weight, weights_only=True)
    before.write_bytes(content)
    assert all(torch.equal(v, after[k]) for k, v in torch.load(before, weights_only=True).items())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a small disk is not permitted here ({error})")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def wait_for_step(group: RankGroup, folder: Path, name: str, step: int) -> None:
    group.wait_for(lambda: len(recorded_steps(folder, name)) >= step * len(group.processes), "step")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_disk_that_fills_or_turns_read_only(fault, assets, tmp_path, small_disk):
    """It is said at once; training goes on, and the saves after it is mended succeed."""
    make_tower(tmp_path / "tower", image_size=32, patch_size=8)
    data, images = make_records(tmp_path / "data", num_records=60)
    argv = train_flags(
        assets,
        tmp_path,
        data,
        images,
        epochs=1000,
        batch_size=2,
        save_interval=2,
        checkpoint_dir=small_disk,
        num_hidden_layers=1,
        **({"save_dir": small_disk} if fault == "full" else {}),
    )
    path = small_disk / "pretrain_vlm_32_resume.pth"
    filler = small_disk / "filler"
    with RankGroup(argv, tmp_path, world_size=2, hook=(record_steps, tmp_path, "a")) as group:
        group.wait_for(previous_path(path).exists, "two saves")
        if fault == "full":
            fill(filler)
        else:
            remount(group, small_disk, "ro")
        group.wait_for(lambda: "warning: saving failed" in group.output(), "warning")
        words = "No space left" if fault == "full" else "Read-only file system"
        assert words in group.output() or "PytorchStreamWriter failed" in group.output()
        if fault == "full":  # a line of the metrics file fits into what its last block has left
            group.wait_for(lambda: "_metrics.jsonl cannot be written" in group.output(), "warning")
        steps = len(recorded_steps(tmp_path, "a")) // 2
        wait_for_step(group, tmp_path, "a", steps + 3)  # it goes on
        assert fault_of(path) is None
        if fault == "full":
            filler.unlink()
        else:
            remount(group, small_disk, "rw")
        before = path.stat().st_ino
        group.wait_for(lambda: path.stat().st_ino != before, "a save after it is mended")
        if fault == "full":  # the lines of the metrics file come late, but all of them come
            metrics = small_disk / "pretrain_vlm_32_metrics.jsonl"
            group.wait_for(lambda: metrics.read_text().count("\n") > steps, "late lines")
            lines = metrics.read_text().split("\n")[:-1]
            assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
        if fault == "full":
            fill(filler)
        else:
            remount(group, small_disk, "ro")
        group.kill(0, signum=signal.SIGTERM)
        statuses = group.wait()
        assert statuses == [1, 1], group.said()  # what it did last is not on disk
        assert f"error: could not write {path}" in group.output()
    assert fault_of(path) is None and fault_of(previous_path(path)) is None


def fill(filler: Path) -> None:
    with open(filler, "wb", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def remount(group: RankGroup, place: Path, mode: str) -> None:
    """Refused while a file is open for writing: tried until it is not."""
    command = ["mount", "-o", f"remount,{mode}", str(place)]
    group.wait_for(lambda: not subprocess.run(command, capture_output=True).returncode, mode)


def test_benchmark_says_what_saving_costs(tmp_path, capsys):
    argv = [
        *"--sizes 32x1 --num_steps 2 --num_rounds 1 --batch_size 1 --num_tokens 16".split(),
        *"--device cpu".split(),
        "--folder",
        str(tmp_path),
    ]
    assert benchmark_saving.main(argv) == 0
    out = capsys.readouterr().out
    assert "32x1: state" in out and "when training waits" in out and "in the background" in out
    assert not list(tmp_path.iterdir())  # it leaves nothing behind
