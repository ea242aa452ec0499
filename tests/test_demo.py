"""The chain on the sample world, on a handful of scenes, and the weights of the repository."""

import argparse

import pytest
from PIL import Image

from dataset.synthetic_drawing import EVAL_IMAGES
from dataset.synthetic_text import CHINESE
from model.inference import Sampling, VLMEngine, add_model_arguments
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


def test_weights_of_the_repository_stay_small():
    files = [*(demo.VISION_DIR / demo.TOWER).iterdir()]
    files += [path for stem in (demo.LLM, demo.VLM) for path in demo.OUT_DIR.glob(f"{stem}.*")]
    assert sum(path.suffix == ".pth" for path in files) == 2
    assert {path.suffix for path in files} == {".pth", ".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 10.5e6  # they count twice in a clone


QUESTIONS = {  # to the words that answer them
    "What colour is the shape?": lambda colour, _: colour,
    "图形是什么颜色？": lambda colour, _: CHINESE[colour],
    "What shape is it?": lambda _, shape: shape,
    "这是什么形状？": lambda _, shape: CHINESE[shape],
    "How many shapes are there?": lambda *_: "1",
    "图中有几个图形？": lambda *_: "1",
}


@pytest.mark.parametrize("number", [n for n, image in enumerate(EVAL_IMAGES) if image[2] == 1])
def test_finished_weight_of_the_repository_answers(number):
    colour, shape, _, _, stem = EVAL_IMAGES[number]
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    engine = VLMEngine.from_args(parser.parse_args(["--weight", "sft_vlm_demo", "--device", "cpu"]))
    image = demo.ROOT / "dataset" / "eval_images" / f"{stem}.png"
    requests = [
        ([{"role": "user", "content": f"<image>\n{question}"}], [image]) for question in QUESTIONS
    ]
    said = [answer.text for answer in engine.generate(requests, Sampling(16, 0))]
    right = [answer(colour, shape) for answer in QUESTIONS.values()]
    assert sum(map(str.__eq__, said, right)) >= len(right) - 1, list(zip(said, right, strict=True))
