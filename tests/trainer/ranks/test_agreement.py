"""If this fails, ranks with different data or flags train together, a state resumes with other
data, or two runs write the same files.
"""

import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.rank_group import RankGroup, record_steps, recorded_steps
from support.scripts import train_flags
from support.tiny_parts import make_records

import eval_vlm
import web_demo
from dataset.records import fingerprint
from dataset.records.fingerprint import ends_fingerprint, file_fingerprint
from trainer import plot, stages, train_args, train_llm, train_pretrain_vlm, train_sft_vlm

STATE = "pretrain_vlm_32_resume.pth"


@pytest.fixture
def data(tmp_path):
    return make_records(tmp_path / "data")


def edit_middle(path: Path, old: str, new: str) -> None:
    """Replace words by as many letters, far from both ends of the file."""
    text = path.read_text(encoding="utf-8")
    half = len(text) // 2
    assert len(old) == len(new) and old in text[half:]
    path.write_text(text[:half] + text[half:].replace(old, new, 1), encoding="utf-8")


def take_own_data(own: Path, *flags: str) -> None:
    """Rank 1 has data, and perhaps flags, of its own."""
    if os.environ["RANK"] == "1":
        parse = train_args.OnceParser.parse_args

        def parse_own(self, argv):
            args = parse(self, argv)
            args.data_path = own
            for name, value in zip(flags[::2], flags[1::2], strict=True):
                setattr(args, name, type(getattr(args, name))(value))
            return args

        train_args.OnceParser.parse_args = parse_own


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["fewer records", "other words", pytest.param("other flags", marks=pytest.mark.full)]
)
def test_ranks_that_differ_say_so_before_the_first_step(fault, assets, tmp_path, data):
    own = tmp_path / "own.jsonl"
    own.write_bytes(data[0].read_bytes())
    flags = ()
    if fault == "fewer records":
        own.write_text("".join(own.read_text().splitlines(keepends=True)[:20]))
    elif fault == "other words":
        edit_middle(own, "picture", "drawing")
    else:
        flags = ("batch_size", "3")
    argv = train_flags(assets, tmp_path, *data)
    with RankGroup(argv, tmp_path, world_size=2, hook=(take_own_data, own, *flags)) as group:
        assert group.wait(timeout_s=60) == [1, 1], group.said()
        for rank in (0, 1):
            error = next(line for line in group.output(rank).splitlines() if "error:" in line)
            assert "the ranks differ in" in error, group.said()
            if fault == "other flags":
                assert "--batch_size: 4 on rank 0; 3 on rank 1" in error
            else:
                count = 20 if fault == "fewer records" else 24
                assert "data: 24 samples, fingerprint" in error
                assert f"on rank 0; {count} samples" in error and "on rank 1" in error
    assert not (tmp_path / "checkpoints" / STATE).exists()


def test_every_byte_of_a_file_counts(tmp_path):
    path = tmp_path / "data"
    content = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    whole = file_fingerprint(path, 1)
    for spot in (0, 1 << 20, (3 << 19) + 5, len(content) - 1):
        edited = content.copy()
        edited[spot] ^= 1
        path.write_bytes(edited.tobytes())
        assert file_fingerprint(path, 1) != whole, spot


def test_blocks_of_a_large_file_lie_all_over_it(tmp_path, monkeypatch):
    """Edits of a few bytes here and there, or of one stretch wherever it is, are noticed."""
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 1 << 8)
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1 << 14)  # 64 blocks
    path = tmp_path / "data"
    content = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    whole = file_fingerprint(path, 1)
    assert file_fingerprint(path, 1) == whole
    edits = [slice(start, start + (1 << 16)) for start in range(0, 1 << 20, 1 << 15)]
    edits.append(np.random.default_rng(1).integers(0, 1 << 20, 2000))
    for spots in edits:
        edited = content.copy()
        edited[spots] ^= 1
        path.write_bytes(edited.tobytes())
        assert file_fingerprint(path, 1) != whole, spots


def test_edited_answers_of_equal_length_are_not_resumed(assets, tmp_path, data, capfd):
    records = [json.loads(line) for line in data[0].read_text().splitlines()]
    for record in (records[0], records[-1]):  # far from both ends: a field that nobody reads
        record["note"] = "x" * (1 << 20)
    data[0].write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = train_flags(assets, tmp_path, *data, batch_size=24)
    assert train_pretrain_vlm.main(argv) == 0
    before = ends_fingerprint(data[0], 24)
    lines = data[0].read_text().splitlines(keepends=True)
    edited = [line.replace("picture. ", "drawing. ") for line in lines[1:-1]]
    data[0].write_text("".join([lines[0], *edited, lines[-1]]))
    assert ends_fingerprint(data[0], 24) == before  # all that earlier versions looked at
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 1
    assert "cannot be resumed: its data is" in capfd.readouterr().err


def test_state_of_an_earlier_version_resumes(assets, tmp_path, data, capfd):
    """Its fingerprint was made of the file's beginning and end."""
    argv = train_flags(assets, tmp_path, *data)
    assert train_pretrain_vlm.main(argv) == 0
    path = tmp_path / "checkpoints" / STATE
    state = torch.load(path, weights_only=True)
    state["identity"]["data"] = ends_fingerprint(data[0], 24)[:16]
    torch.save(state, path)
    (path.parent / f"{STATE}.previous").unlink(missing_ok=True)
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 0
    assert "its data is as an earlier version computed it" in capfd.readouterr().out
    edit_middle(data[0], "picture", "drawing")
    state["identity"]["data"] = "0" * 16
    torch.save(state, path)
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 1


@pytest.mark.slow
def test_second_run_of_a_name_is_refused_until_the_first_is_gone(assets, tmp_path, data, capfd):
    argv = train_flags(assets, tmp_path, *data, epochs=1000, num_hidden_layers=1, num_workers=1)
    short = train_flags(assets, tmp_path, *data, num_hidden_layers=1, batch_size=24)
    elsewhere = train_flags(
        assets, tmp_path, *data, num_hidden_layers=1, batch_size=24, save_weight="other"
    )
    other_states = train_flags(
        assets, tmp_path, *data, num_hidden_layers=1, batch_size=24, checkpoint_dir=tmp_path / "own"
    )
    hook = (record_steps, tmp_path, "run")
    with RankGroup(argv, tmp_path, world_size=1, hook=hook) as group:
        group.wait_for(lambda: len(recorded_steps(tmp_path, "run")) > 2, "steps")
        files = {p.name for p in (tmp_path / "out").iterdir()}
        for refused in (short, other_states):
            assert train_pretrain_vlm.main(refused) == 1
            error = capfd.readouterr().err.splitlines()[-1]
            assert "error: another run writes pretrain_vlm_32 in" in error, error
            assert f"process {group.processes[0].pid} on" in error
        assert files <= {p.name for p in (tmp_path / "out").iterdir()}
        assert train_pretrain_vlm.main(elsewhere) == 0, capfd.readouterr().err
        group.kill(signum=signal.SIGKILL)
        group.wait()
    assert train_pretrain_vlm.main(short) == 0, capfd.readouterr().err
    assert not list(tmp_path.glob("*/.*.lock"))


@pytest.mark.slow
def test_all_ranks_hear_of_the_other_run(assets, tmp_path, data):
    argv = train_flags(assets, tmp_path, *data, epochs=1000, num_hidden_layers=1)
    hook = (record_steps, tmp_path, "run")
    with RankGroup(argv, tmp_path, world_size=1, hook=hook) as group:
        group.wait_for(lambda: len(recorded_steps(tmp_path, "run")) > 2, "steps")
        with RankGroup(argv, tmp_path, world_size=2, name="second") as second:
            assert second.wait(timeout_s=60) == [1, 1], second.said()
            assert all("another run writes" in second.output(rank) for rank in (0, 1))


def test_file_system_without_locks_is_said(assets, tmp_path, data, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("trainer.saving.lock.fcntl.flock", refuse)
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, *data, batch_size=24)) == 0
    assert "knows no locks" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (train_pretrain_vlm.main, ("--data_path", "a", "--data_path", "b")),
        (train_llm.main, ("--data_path", "a.txt", "--data_path=b.txt")),
        (train_sft_vlm.main, ("--val_images_path", "a", "--val_images_path", "a")),
        (eval_vlm.main, ("--choices", "a", "--choices=b")),
    ],
    ids=["pretrain", "llm", "sft", "evaluation"],
)
def test_data_that_is_named_twice_is_refused_in_one_line(main, flags, capfd):
    with pytest.raises(SystemExit) as ended:
        main(list(flags))
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"{flags[0]} is given more than once" in err


@pytest.mark.parametrize(
    ("parse", "flags"),
    [
        (partial(train_args.parse_args, stages.LLM, description=""),
         ("--hidden_size", "32", "--dim", "64")),
        (eval_vlm.parse_args, ("--weight", "a", "--weight=b")),
        (web_demo.parse_args, ("--port", "1", "--port", "2")),
        (plot.parse_args, ("--out", "a", "--out", "b")),
    ],
    ids=["llm, by another name", "evaluation", "page", "plot"],
)  # fmt: skip
def test_of_a_repeated_flag_the_last_counts_and_is_said(parse, flags, capfd):
    args = parse(list(flags))
    name, value = flags[0].removeprefix("--"), flags[-1].rpartition("=")[2]
    assert str(getattr(args, name)) == value
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"more than once; the last, {value}, counts" in err
    parse([*flags[:2], *flags[:2]])
    assert capfd.readouterr().err == ""


def test_steps_without_a_gradient_are_said_once(assets, tmp_path, capfd):
    data = tmp_path / "text.jsonl"
    line = {
        "conversations": [
            {"role": "user", "content": "What is a circle?"},
            {"role": "assistant", "content": "A round shape."},
        ]
    }
    data.write_text((json.dumps(line) + "\n") * 24)
    argv = train_flags(assets, tmp_path, data, None, trainable="vision_proj", log_interval=2)
    assert train_pretrain_vlm.main(argv) == 0
    err = capfd.readouterr().err
    assert err.count("no gradient at all reached what trains (vision_proj") == 1, err
    with_images = make_records(tmp_path / "data")
    argv = train_flags(
        assets, tmp_path / "b", *with_images, trainable="vision_proj", log_interval=3
    )
    assert train_pretrain_vlm.main(argv) == 0
    assert "no gradient" not in capfd.readouterr().err
