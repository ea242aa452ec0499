"""If this fails, a mistake with a training script ends in a traceback, or passes unnoticed, instead
of one clear line.
"""

import json

import pytest
import torch
from support.scripts import run_script, train_flags
from support.tiny_parts import conversation, make_records

import eval_vlm
from trainer import train_pretrain_vlm, train_sft_vlm


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
    """A folder with `out/llm_32.pth` and a finished pretrain run."""
    folder = tmp_path_factory.mktemp("trained")
    data = make_records(folder / "data")
    argv = train_flags(assets, folder, *data)
    assert train_pretrain_vlm.main([*argv, "--save_weight", "llm"]) == 0
    assert train_pretrain_vlm.main(argv) == 0
    return folder, data


def error_of(capfd, argv, *, main=train_pretrain_vlm.main) -> str:
    """The one line that a failing run prints on stderr, warnings aside."""
    capfd.readouterr()
    assert main(argv) == 1
    captured = capfd.readouterr()
    assert "Epoch:[" not in captured.out, "training had started"
    lines = [x for x in captured.err.splitlines() if not x.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


FLAG_CASES = {
    "range": ({"batch_size": 0}, "--batch_size 0 is too small"),
    "learning rate": ({"learning_rate": 0}, "--learning_rate"),
    "device": ({"device": "abacus"}, "--device 'abacus' is not a device"),
    "no cuda": ({"device": "cuda"}, "has no CUDA"),
    "missing data": ({"data_path": "gone.jsonl"}, "no data file gone.jsonl"),
    "missing images": ({"images_path": "gone"}, "gone is neither a folder nor a zip"),
    "missing tower": ({"vision_model_path": "gone"}, "no vision tower: gone"),
    "missing tokenizer": ({"tokenizer_path": "gone"}, "no tokenizer: gone"),
    "missing weight": ({"from_weight": "gone"}, "no weight gone_32.pth in"),
    "missing weight file": ({"from_weight": "a/b.pth"}, "no weight file a/b.pth"),
    "hidden size": ({"hidden_size": 40}, "hidden_size 40 is no multiple of 16"),
    "regex": ({"trainable": "("}, "is not a regular expression"),
    "nothing trains": ({"trainable": "no_such_name"}, "matches no parameter"),
    "placeholder": ({"image_special_token": "@" * 9}, "gives 16 tokens per image"),
    "val without data": ({"val_images_path": "x"}, "needs --val_data_path"),
}


@pytest.mark.parametrize("case", FLAG_CASES)
def test_bad_flag_ends_in_one_line(case, assets, tmp_path, capfd):
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    flags, message = FLAG_CASES[case]
    data = make_records(tmp_path / "data", num_records=4)
    argv = train_flags(assets, tmp_path, *data, **flags)
    assert message in error_of(capfd, argv)


@pytest.mark.parametrize("flag", [["--dtype", "int4"], ["--use_moe", "maybe"], ["--colour", "red"]])
def test_unknown_flag_or_value_is_argparses(flag, capfd):
    with pytest.raises(SystemExit) as caught:
        train_pretrain_vlm.main(flag)
    assert caught.value.code == 2 and flag[-1] in capfd.readouterr().err


def test_unwritable_save_dir(assets, tmp_path, capfd):
    data = make_records(tmp_path / "data", num_records=4)
    (tmp_path / "file").touch()
    for name in ("save_dir", "checkpoint_dir"):
        argv = train_flags(assets, tmp_path, *data, **{name: tmp_path / "file" / "below"})
        assert f"--{name}" in (line := error_of(capfd, argv)) and "cannot be written" in line


def test_weight_of_another_size_or_architecture(assets, trained, capfd):
    folder, data = trained
    base = {"from_weight": folder / "out" / "llm_32.pth", "hidden_size": None}
    for flags, message in (
        ({"hidden_size": 64}, "has hidden_size 32, not 64"),
        ({"num_hidden_layers": 5}, "has num_hidden_layers 2, not 5"),
        ({"use_moe": 1}, "has use_moe False, not True"),
    ):
        argv = train_flags(assets, folder, *data, **(base | flags))
        assert message in error_of(capfd, argv)
    torch.save({"transformer.h.0.weight": torch.ones(2)}, folder / "gpt2.pth")
    argv = train_flags(assets, folder, *data, **(base | {"from_weight": folder / "gpt2.pth"}))
    assert "is not a MiniMind weight" in error_of(capfd, argv)


def test_tokenizer_of_another_weight_is_refused(assets, trained, tmp_path, capfd):
    from support.tiny_parts import make_tokenizer

    folder, data = trained
    make_tokenizer(tmp_path / "other", texts=["quite another text"] * 3, vocab_size=300)
    argv = train_flags(assets, folder, *data, from_weight="llm", tokenizer_path=tmp_path / "other")
    assert "is not the one this weight was trained with" in error_of(capfd, argv)


def test_tower_of_another_weight_is_refused(assets, trained, tmp_path, capfd):
    from support.tiny_parts import make_tower

    folder, data = trained
    for size, message in ((24, "was trained with another vision tower"), (48, "is 48 wide")):
        make_tower(
            tmp_path / str(size),
            image_size=32 if size == 48 else 64,
            patch_size=8 if size == 48 else 16,
            hidden_size=size,
        )
        argv = train_flags(
            assets,
            folder,
            *data,
            from_weight="pretrain_vlm",
            vision_model_path=tmp_path / str(size),
        )
        assert message in error_of(capfd, argv, main=train_sft_vlm.main)


def test_weight_near_chance_warns_of_the_tokenizer(assets, trained, capfd):
    """A plain file says nothing of its tokenizer; this one never learnt ordinary sentences."""
    folder, data = trained
    plain = folder / "plain_32.pth"
    plain.write_bytes((folder / "out" / "llm_32.pth").read_bytes())
    for weight, warns in (("llm", False), (plain, True)):
        argv = train_flags(assets, folder, *data, from_weight=weight, learning_rate=1e-9)
        assert train_sft_vlm.main(argv) == 0
        err = capfd.readouterr().err
        assert ("weights and tokenizer may not belong together" in err) == warns
        assert ("--tokenizer_path" in err) == warns


def with_bad_lines(folder, *, num_good: int):
    """Records of which one has a missing image and one a picture that is cut off."""
    data, images = make_records(folder, num_records=num_good)
    picture = (images / "0_0.png").read_bytes()
    (images / "cut.png").write_bytes(picture[: len(picture) // 2])
    with data.open("a") as file:
        for name in ("gone.png", "cut.png"):
            file.write(json.dumps(conversation("<image>", "A picture.", image=name)) + "\n")
    return data, images


def test_bad_samples_are_skipped_counted_and_reported(assets, tmp_path, capfd):
    data = with_bad_lines(tmp_path / "data", num_good=220)
    argv = train_flags(assets, tmp_path, *data, batch_size=16, log_interval=100)
    assert train_pretrain_vlm.main(argv) == 0
    captured = capfd.readouterr()
    assert "1 record(s) will be left out; the first: data_0.jsonl:221: image 'gone.png'" in (
        captured.err
    )
    assert "sample left out: data_0.jsonl:222: not a readable image" in captured.out
    assert "2 sample(s) were left out" in captured.err
    assert (tmp_path / "out" / "pretrain_vlm_32.pth").is_file()


def test_more_than_one_percent_bad_samples_is_an_error(assets, tmp_path, capfd):
    data, images = with_bad_lines(tmp_path / "data", num_good=60)
    argv = train_flags(assets, tmp_path, data, images)
    assert "1 of 62 samples cannot be used, more than 1%" in error_of(capfd, argv)
    (images / "gone.png").write_bytes((images / "0_1.png").read_bytes())
    assert train_pretrain_vlm.main(argv) == 1  # the cut picture shows only when it is decoded
    assert "1 of 62 samples cannot be used" in capfd.readouterr().err


def test_bad_sample_can_be_an_error(assets, tmp_path, capfd):
    data, images = with_bad_lines(tmp_path / "data", num_good=220)
    argv = [*train_flags(assets, tmp_path, data, images), "--on_bad_sample", "error"]
    assert "data_0.jsonl:221: image 'gone.png' is not in" in error_of(capfd, argv)
    (images / "gone.png").write_bytes((images / "0_1.png").read_bytes())
    assert train_pretrain_vlm.main(argv) == 1
    assert "error: data_0.jsonl:222: not a readable image" in capfd.readouterr().err


def test_resume_refuses_another_run_and_names_the_difference(assets, trained, tmp_path, capfd):
    folder, data = trained
    other = make_records(tmp_path / "other", seed=3)
    for argv, message in (
        (train_flags(assets, folder, *other), "its data is"),
        (train_flags(assets, folder, *data, seed=1), "its seed is 42, this run's is 1"),
        (train_flags(assets, folder, *data, freeze_llm=1), "its trained parameters is"),
        (train_flags(assets, folder, *data, num_hidden_layers=1), "its model is"),
    ):
        assert message in error_of(capfd, [*argv, "--from_resume", "1"])


def test_resume_refuses_foreign_and_torn_states(assets, tmp_path, capfd):
    data = make_records(tmp_path / "data", num_records=4)
    argv = [*train_flags(assets, tmp_path, *data), "--from_resume", "1"]
    state = tmp_path / "checkpoints" / "pretrain_vlm_32_resume.pth"
    state.parent.mkdir()
    torch.save({"model": {}, "optimizer": {}, "epoch": 1, "step": 5, "world_size": 1}, state)
    assert "original project's states cannot be resumed" in error_of(capfd, argv)
    state.write_bytes(state.read_bytes()[:200])
    assert "is not a readable training state" in error_of(capfd, argv)


def test_resume_without_a_state_starts_afresh_and_after_the_end_is_done(assets, tmp_path, capfd):
    data = make_records(tmp_path / "data", num_records=4)
    argv = [*train_flags(assets, tmp_path, *data), "--from_resume", "1"]
    assert train_pretrain_vlm.main(argv) == 0
    assert "so this run starts afresh" in capfd.readouterr().out
    weight = (tmp_path / "out" / "pretrain_vlm_32.pth").read_bytes()
    assert train_pretrain_vlm.main(argv) == 0
    assert "Epoch:[" not in capfd.readouterr().out
    assert (tmp_path / "out" / "pretrain_vlm_32.pth").read_bytes() == weight


def test_runs_from_any_directory_with_relative_paths(assets, tmp_path):
    data, _ = make_records(tmp_path, num_records=4)
    argv = train_flags(assets, tmp_path, data.name, "images", save_dir="made_here")
    run_script("trainer/train_pretrain_vlm.py", *argv, cwd=tmp_path)
    assert (tmp_path / "made_here" / "pretrain_vlm_32.pth").is_file()


def test_eval_reports_bad_input(assets, trained, tmp_path, capfd):
    folder, _ = trained
    base = [
        "--save_dir",
        folder / "out",
        "--vision_model_path",
        assets / "tower",
        "--tokenizer_path",
        assets / "tokenizer",
        "--max_new_tokens",
        2,
    ]
    for extra, message in (
        (["--weight", "gone"], "no weight gone_512.pth"),
        (["--weight", "llm", "--hidden_size", 64], "no weight llm_64.pth"),
        (["--image_dir", tmp_path / "gone"], "is not a folder"),
        (["--load_from", tmp_path], "no config.json there"),
    ):
        assert eval_vlm.main(list(map(str, [*base, *extra]))) == 1
        error = capfd.readouterr().err
        assert message in error and error.count("\n") == 1, error
    process = run_script("eval_vlm.py", *base, "--weight", "gone", check=False)
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
