"""The chain on the sample world, on a handful of scenes, and the weights of the repository."""

import argparse

import pytest
from conftest import ROOT
from PIL import Image

from dataset.synthetic_text import CHINESE
from model.inference import Sampling, VLMEngine, add_model_arguments, ask
from trainer import demo

FEW = ["--num_pretrain", "16", "--num_train", "32", "--num_heldout", "24"]


@pytest.fixture
def chains_in(tmp_path, monkeypatch):
    """Both chains work in a temporary folder."""
    folder = tmp_path / "zero"
    monkeypatch.setattr(demo, "FROM_ZERO", demo.FROM_ZERO | {
        "folder": folder, "tower": folder / demo.TOWER, "llm": folder / f"{demo.LLM}.pth"
    })  # fmt: skip
    monkeypatch.setattr(demo, "VISION_DIR", tmp_path / "vision_model")
    monkeypatch.setattr(demo, "OUT_DIR", tmp_path / "out")
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.mark.slow
def test_whole_chain_from_zero_runs_finds_what_is_done_and_publishes(chains_in, capfd):
    argv = ["--from_zero", "1", "--tower_steps", "2", "--text_share", "0.0005", *FEW]
    assert demo.main(argv) == 0
    out = capfd.readouterr().out
    assert "grounding gap" in out and "shuffled" in out and "GFLOP/s" in out
    assert "eval_vlm.py --chat" in out and "web_demo.py" in out and "download.py" in out
    assert Image.open(chains_in / "zero" / "report.png").size > (600, 400)
    assert demo.main([*argv, "--publish", "1"]) == 0
    assert "Epoch:[" not in capfd.readouterr().out  # nothing is trained twice
    assert (chains_in / "vision_model" / demo.TOWER / "config.json").is_file()
    assert (chains_in / "out" / f"{demo.VLM}.pth").is_file()


def test_another_seed_writes_beside_the_usual_one():
    usual, other = demo.Chain(), demo.Chain(seed=7)
    assert usual.out == usual.folder and other.out == usual.folder / "seed_7"
    assert other.data == usual.data and other.llm == usual.llm


def test_only_what_is_made_from_zero_is_published(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--publish", "1"])
    assert "--from_zero" in capsys.readouterr().err


def test_demo_without_weights_names_the_way(tmp_path, monkeypatch, capfd):
    chain = demo.Chain(llm=tmp_path / "gone.pth")
    monkeypatch.setattr(demo, "Chain", lambda **_: chain)
    assert demo.main([]) == 1
    assert "make from-zero" in capfd.readouterr().err


def test_finished_weight_of_the_repository_sees():
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    args = parser.parse_args(["--weight", "sft_vlm_demo", "--device", "cpu"])
    engine = VLMEngine.from_args(args)
    pictures = {
        path: path.stem.split("-")[-2:]
        for path in (ROOT / "dataset" / "eval_images").glob("*.png")
        if path.stem.split("-")[-2] in CHINESE  # a colour and a shape: one shape alone
    }
    assert len(pictures) == 4
    samples, expected = [], []
    for path, (colour, shape) in pictures.items():
        for question, answer in (
            ("What colour is the shape?", colour), ("What shape is it?", shape),
            ("图形是什么颜色？", CHINESE[colour]), ("这是什么形状？", CHINESE[shape]),
            ("How many shapes are there?", "1"),
        ):  # fmt: skip
            samples.append((ask(question, num_images=1), [path]))
            expected.append(answer)
    said = [answer.text for answer in engine.generate(samples, Sampling(16, 0))]
    assert sum(a == b for a, b in zip(said, expected, strict=True)) >= 19, list(
        zip(said, expected, strict=True)
    )


def test_weights_of_the_repository_stay_small():
    folders = (demo.VISION_DIR / demo.TOWER, demo.OUT_DIR)
    names = (demo.LLM, demo.VLM)
    files = [*folders[0].iterdir(), *(p for n in names for p in folders[1].glob(f"{n}.*"))]
    assert {p.suffix for p in files} >= {".pth", ".json", ".safetensors"}
    assert sum(p.stat().st_size for p in files) < 10.5e6  # they count twice in a clone
