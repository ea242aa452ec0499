"""If this fails, an export that cannot be made is no clear line, or leaves something behind."""

import argparse
import json
import os
import resource
import signal

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.exporting import export, make_kit
from support.tiny_parts import make_tokenizer

from model.export import files
from model.export.__main__ import main
from model.options import add_model_arguments
from model.weights.build_model import load_model


@pytest.fixture(scope="module")
def kit(assets, tmp_path_factory):
    return make_kit(tmp_path_factory.mktemp("weights"), assets)


@pytest.fixture(scope="module")
def llama(kit, tmp_path_factory):
    """An export of the language model."""
    out = tmp_path_factory.mktemp("exports") / "llama"
    export(kit, "llama", out)
    return out


def refused(capsys, *argv, status: int = 1) -> str:
    """The one line of an export that must not do well."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    (line,) = [line for line in lines if line.startswith("error: ") or status != 1]
    return line


def left_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("flags", "to", "line"),
    [
        (["--vision_model_path", "nowhere"], "llava", "no vision tower: nowhere"),
        (["--tokenizer_path", "nowhere"], "llama", "no tokenizer: nowhere"),
        (["--tokenizer_path", "OTHER"], "llava", "is not the one this weight was trained with"),
        (["--tokenizer_path", "OTHER"], "llama", "is not the one this weight was trained with"),
        ([], "internvl", "has projector 'linear', but a stock InternVL has 'mlp'"),
        ([], "qwen3", "is of generation 2, --to qwen3 of 3; take --to llama"),
        ([], "pth", "--to pth needs the folder to read: --load_from FOLDER"),
        (["--projector_gelu", "1"], "llama", "--projector_gelu is of --to llava"),
        (["--projector_gelu", "1", "--dtype", "bfloat16"], "llava", "which only float32 bears"),
        (["--weight", "nothing"], "llava", "no weight nothing_512.pth"),
    ],
)
def test_what_does_not_fit_is_one_line(flags, to, line, kit, tmp_path, capsys):
    make_tokenizer(tmp_path / "OTHER", texts=["quite another text"] * 4, vocab_size=300)
    flags = [str(tmp_path / word) if word == "OTHER" else word for word in flags]
    out = tmp_path / "out"
    assert line in refused(capsys, *kit.flags, *flags, "--to", to, "--out", out)
    assert left_in(tmp_path) == ["OTHER"]


def test_language_model_does_not_see(kit, llama, tmp_path, capsys):
    weight = tmp_path / "llm_32.pth"
    assert main(["--load_from", str(llama), "--to", "pth", "--out", str(weight)]) == 0
    flags = [*kit.flags, "--weight", weight, "--to", "llava", "--out", tmp_path / "out"]
    assert "is a language model without a projection" in refused(capsys, *flags)


def test_projection_that_no_stock_class_has_is_refused(assets, tmp_path, capsys):
    placeholder = {"image_special_token": "@" * 4, "image_ids": [34] * 4}
    merged = make_kit(tmp_path, assets, token_merge=2, **placeholder)
    line = refused(capsys, *merged.flags, "--to", "llava", "--out", tmp_path / "out")
    assert "has token_merge 2, but a stock Llava has 1; export it by --to transformers" in line


def test_pictures_of_another_size_than_the_towers(assets, tmp_path, capsys):
    """Stock classes take the tower's own size; with our code the folder says its size."""
    placeholder = {"image_special_token": "@" * 64, "image_ids": [34] * 64}
    large = make_kit(tmp_path, assets, image_size=64, **placeholder)
    line = refused(capsys, *large.flags, "--to", "llava", "--out", tmp_path / "out")
    assert "has image_size 64, but a stock Llava has 32; export it by --to transformers" in line
    export(large, "transformers", tmp_path / "own")
    args = argparse.ArgumentParser()
    add_model_arguments(args)
    loaded = load_model(args.parse_args(["--load_from", str(tmp_path / "own")]))
    assert loaded.processor.pixel_values([Image.new("RGB", (40, 30))]).shape == (1, 3, 64, 64)


def test_what_stands_there_is_not_overwritten(kit, tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    flags = [*kit.flags, "--to", "llama", "--out"]
    assert "is not empty; name a new folder" in refused(capsys, *flags, tmp_path)
    assert "is a file; name a new folder" in refused(capsys, *flags, tmp_path / "kept")
    assert left_in(tmp_path) == ["kept"] and (tmp_path / "kept").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(kit, "llama", tmp_path / "empty")
    assert "model.safetensors" in left_in(tmp_path / "empty")


def test_full_disk_leaves_nothing(kit, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # less than the tensors take
    try:
        line = refused(capsys, *kit.flags, "--to", "llava", "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the disk is full; free some space or name another folder" in line
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing(number, kit, tmp_path, capsys, monkeypatch):
    def stopped(state, path, metadata):
        save_file(state, path, metadata)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(files, "save_file", stopped)
    flags = [*kit.flags, "--to", "llava", "--out", tmp_path / "out"]
    assert "nothing was written" in refused(capsys, *flags, status=128 + number)
    assert left_in(tmp_path) == []


def test_killed_run_is_cleared_by_the_next(kit, tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "half").write_text("")
    export(kit, "llama", tmp_path / "out")
    assert left_in(tmp_path) == ["out"] and "half" not in left_in(tmp_path / "out")


def theirs(llama, folder, **changes):
    """A copy of a folder without our description, its config changed."""
    folder.mkdir()
    config = json.loads((llama / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' cannot be read here; known are minimind-v"),
        ({"model_type": "llava"}, "so it was not exported from here"),
        ({"attention_bias": True}, "has attention_bias True, but ours is False"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "of the kind llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "of the kind linear"),
        ({"num_attention_heads": 7}, "config.json cannot be used"),
        ({"vocab_size": 399}, "has another size of 1 tensor(s): model.embed_tokens.weight"),
    ],
)
def test_folder_that_is_no_weight_is_one_line(changes, line, llama, tmp_path, capsys):
    folder, out = theirs(llama, tmp_path / "theirs", **changes), tmp_path / "llm_32.pth"
    if "vocab_size" in changes:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert line in refused(capsys, "--load_from", folder, "--to", "pth", "--out", out)
    assert left_in(tmp_path) == ["theirs"]


def test_way_back_overwrites_nothing_and_reads_nothing_damaged(llama, tmp_path, capsys):
    flags = ["--load_from", llama, "--to", "pth", "--out"]
    assert "--to pth writes one weight; name it" in refused(capsys, *flags, tmp_path / "folder")
    (tmp_path / "llm_32.pth").write_text("mine")
    assert "is there already" in refused(capsys, *flags, tmp_path / "llm_32.pth")
    folder = theirs(llama, tmp_path / "theirs")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    flags = ["--load_from", folder, "--to", "pth", "--out", tmp_path / "other_32.pth"]
    assert "git lfs pull" in refused(capsys, *flags)
    assert "config.json; --to pth reads" in refused(capsys, *flags, "--load_from", tmp_path)
