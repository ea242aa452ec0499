"""If this fails, a command line of `eval_vlm.py` that users copy from the README does not run, or a
mistake in it ends in a traceback.
"""

import argparse
import socket

import pytest
import torch
from support.api_site import model_flags
from support.scripts import run_script, train_flags
from support.tiny_parts import make_records

import eval_vlm
import web_demo
from dataset import prompt_picture
from model.options import add_model_arguments
from model.weights.build_model import load_model
from trainer import train_pretrain_vlm


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
    """Weights `llm` (without a projection) and `sft_vlm` of the tiny size, and some pictures."""
    folder = tmp_path_factory.mktemp("eval")
    data = make_records(folder / "data", num_records=8)
    argv = train_flags(assets, folder, *data, learning_rate=0.003)
    assert train_pretrain_vlm.main([*argv, "--save_weight", "sft_vlm"]) == 0
    state = torch.load(folder / "out" / "sft_vlm_32.pth", weights_only=True)
    language = {k: v for k, v in state.items() if not k.startswith("vision_proj")}
    torch.save(language, folder / "out" / "llm_32.pth")
    return folder


def flags(assets, folder, **extra) -> list[str]:
    values = {
        "save_dir": folder / "out",
        "vision_model_path": assets / "tower",
        "tokenizer_path": assets / "tokenizer",
        "image_dir": folder / "data" / "images",
        "max_new_tokens": 6,
        "device": "cpu",
    } | extra
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def answers(out: str) -> dict[str, str]:
    blocks = out.split("\n[")[1:]
    return dict(block.rstrip("\n").split("] ", 1) for block in blocks)


def test_every_picture_is_described_in_name_order_and_seeded(assets, trained, capfd):
    assert eval_vlm.main(flags(assets, trained)) == 0
    first = answers(capfd.readouterr().out)
    assert list(first) == sorted(p.name for p in (trained / "data" / "images").iterdir())
    assert eval_vlm.main(flags(assets, trained)) == 0
    assert answers(capfd.readouterr().out) == first
    assert eval_vlm.main(flags(assets, trained, seed=1)) == 0
    assert answers(capfd.readouterr().out) != first


def test_prompt_without_a_tag_shows_the_picture_first(assets, trained, capfd):
    shown = []
    for prompt in ("What?", "<image>\nWhat?"):
        assert eval_vlm.main(flags(assets, trained, prompt=prompt, temperature=0)) == 0
        shown.append(answers(capfd.readouterr().out))
    assert shown[0] == shown[1]


def test_language_model_without_projection_runs_and_warns(assets, trained, capfd):
    assert eval_vlm.main(flags(assets, trained, weight="llm")) == 0
    captured = capfd.readouterr()
    assert "llm_32.pth has no projection, so this model cannot see" in captured.err
    assert len(answers(captured.out)) == 8


def test_server_of_a_language_model_warns(assets, trained, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that it ends when it has begun
        argv = [
            *model_flags(assets, trained / "out"),
            *"--weight llm --api".split(),
            "--port",
            taken.getsockname()[1],
        ]
        assert web_demo.main(list(map(str, argv))) == 1
    err = capfd.readouterr().err
    assert "warning: llm_32.pth has no projection, so this model cannot see" in err
    assert "error: cannot listen at" in err and err.count("\n") == 2


def test_broken_picture_is_named_and_the_others_described(assets, trained, tmp_path, capfd):
    (tmp_path / "a.png").write_bytes(next((trained / "data" / "images").iterdir()).read_bytes())
    (tmp_path / "b.jpg").write_text("no picture")
    (tmp_path / "notes.txt").write_text("not looked at")
    assert eval_vlm.main(flags(assets, trained, image_dir=tmp_path)) == 1
    captured = capfd.readouterr()
    assert "[a.png] " in captured.out and "notes.txt" not in captured.out
    assert "b.jpg: not a readable image" in captured.err


def test_transformers_folder_gives_the_native_answers(assets, trained, tmp_path, capfd):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    native = flags(assets, trained, temperature=0)
    loaded = load_model(parser.parse_known_args(native)[0])
    loaded.model.save_pretrained(tmp_path / "folder")
    loaded.processor.tokenizer.save_pretrained(tmp_path / "folder")
    assert eval_vlm.main(native) == 0
    expected = answers(capfd.readouterr().out)
    folder = [x for x in native if x not in ("--tokenizer_path", str(assets / "tokenizer"))]
    assert eval_vlm.main([*folder, "--load_from", str(tmp_path / "folder")]) == 0
    assert answers(capfd.readouterr().out) == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"device": "abacus"}, "is not a device"),
        ({"temperature": -1}, "--temperature must be at least 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens must be at least 1"),
        ({"top_p": 0}, "--top_p must be above 0"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"seed": 2**63}, "--seed must be from 0"),
        ({"prompt": "<image> <image>"}, "2 <image> tag(s) but 1 image(s)"),
        ({"prompt": "<|im_end|>"}, "special token <|im_end|>"),
    ],
)
def test_bad_value_is_one_clear_line(extra, message, assets, trained, capfd):
    assert eval_vlm.main(flags(assets, trained, **extra)) == 1
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_page_and_server_refuse_a_seed_out_of_range(seed, assets, trained, capfd):
    for more in ([], ["--api"]):
        argv = [*model_flags(assets, trained / "out"), "--port", 0, "--seed", seed, *more]
        assert web_demo.main(list(map(str, argv))) == 1
        err = capfd.readouterr().err
        assert "--seed must be from 0" in err and err.count("\n") == 1


def test_traceback_behind_a_line_is_shown_on_request(assets, tmp_path, monkeypatch):
    """As CONTRIBUTING.md has it, by every script that ends in one line."""
    monkeypatch.setenv("MINIMIND_TRACEBACK", "1")
    missing = ["--weight", "gone", *model_flags(assets, tmp_path)]
    tower = model_flags(assets, tmp_path)[4:]
    for main, argv in (
        (eval_vlm.main, missing),
        (web_demo.main, missing),
        (prompt_picture.main, ["--data_path", tmp_path / "gone.jsonl", *tower]),
    ):
        with pytest.raises(FileNotFoundError, match="gone"):
            main(list(map(str, argv)))


def test_runs_from_another_directory(assets, trained, tmp_path):
    process = run_script("eval_vlm.py", *flags(assets, trained), cwd=tmp_path)
    assert len(answers(process.stdout)) == 8 and process.stderr == ""
