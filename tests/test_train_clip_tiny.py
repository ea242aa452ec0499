"""The tiny tower's training: its scenes, its pixels, and the folder it writes."""

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.synthetic_world import is_heldout_scene, sample_scene
from model.model_vlm import MiniMindVLM, count_image_tokens
from model.vlm_processor import load_tokenizer
from trainer import demo, train_clip_tiny
from trainer.train_clip_tiny import GROUP, SceneGroups, change_scene, preprocess


def test_changed_scene_differs_in_one_thing():
    rng = Random(0)
    kinds = set()
    for _ in range(200):
        scene = sample_scene(rng)
        changed = change_scene(scene, rng)
        assert len(changed.items) == len(scene.items) and changed.character == scene.character
        assert len({i.place for i in changed.items}) == len(changed.items)
        assert changed.character_place not in {i.place for i in changed.items}
        before, after = (
            {(i.shape, i.colour, i.place, i.radius) for i in s.items} for s in (scene, changed)
        )
        kinds.add(len(before - after))
        for item in changed.items:  # it stands where its place says
            assert (item.x > 0.5) == item.place.endswith("right")
            assert (item.y > 0.5) == item.place.startswith("bottom")
    assert kinds == {1, 2}  # 2: two shapes changed places


def test_groups_are_of_training_scenes_and_repeatable():
    tokenizer = load_tokenizer()
    groups = SceneGroups(10, seed=3, tokenizer=tokenizer)
    for index in (0, 9):  # unrelated scenes, then similar ones
        pictures, texts = groups[index]
        again = groups[index]
        assert np.array_equal(pictures, again[0]) and texts == again[1]
        assert len(pictures) == len(texts) == GROUP
        assert len({tuple(t) for t in texts}) == GROUP
        assert all(t[-1] == tokenizer.eos_token_id for t in texts)
    assert not np.array_equal(groups[0][0], groups[1][0])
    assert is_heldout_scene(sample_scene(Random(1), split="heldout"))


def test_pixels_are_those_of_the_image_processor():
    pictures = SceneGroups(1, seed=0, tokenizer=load_tokenizer())[0][0]
    images = [Image.fromarray(p) for p in pictures]
    expected = train_clip_tiny.PROCESSOR(images=images, return_tensors="pt")["pixel_values"]
    ours = preprocess(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    torch.testing.assert_close(ours, expected, atol=0.031, rtol=0)  # two of 255
    assert (ours - expected).abs().mean() < 0.003


@pytest.mark.slow
def test_training_writes_a_clip_folder_that_the_model_takes(tmp_path, capfd):
    argv = ["--save_dir", str(tmp_path), "--steps", "12", "--batch_size", "8", "--hidden_size",
            "48", "--num_hidden_layers", "1", "--text_hidden_size", "16", "--num_workers", "0",
            "--log_interval", "6", "--warmup_steps", "2", "--device", "cpu"]  # fmt: skip
    assert train_clip_tiny.main(argv) == 0
    out = capfd.readouterr().out
    assert "step 12/12 loss:" in out and "in-batch accuracy" in out
    tower, processor = MiniMindVLM.get_vision_model(tmp_path)
    assert count_image_tokens(tower.config, keep_cls=False) == 196
    pixels = MiniMindVLM.image2tensor(Image.new("RGB", (96, 96), "red"), processor)
    features = MiniMindVLM.get_image_embeddings(pixels, tower)
    assert features.shape == (1, 196, 48) and features.isfinite().all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "6"], "--batch_size 6 is not a multiple of 4"),
        (["--hidden_size", "50"], "--hidden_size must be a multiple of 48"),
        (["--steps", "0"], "at least 1"),
        (["--tokenizer_path", "gone"], "no tokenizer: gone"),
        (["--device", "abacus"], "is not a device"),
    ],
)
def test_bad_flag_is_one_line(flags, message, capfd):
    assert train_clip_tiny.main(flags) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_whole_chain_from_zero_runs_and_finds_what_is_done(tmp_path, monkeypatch, capfd):
    """As `make from-zero` does it, on a handful of scenes."""
    monkeypatch.setattr(demo, "DEMO_DIR", tmp_path)
    monkeypatch.setattr(demo, "TOWER_DIR", tmp_path / "tower")
    monkeypatch.setattr(demo, "LLM", tmp_path / "llm_192.pth")
    argv = ["--from_zero", "1", "--tower_steps", "2", "--num_text", "20", "--num_train", "32",
            "--num_heldout", "24", "--sft_epochs", "1"]  # fmt: skip
    assert demo.main(argv) == 0
    out = capfd.readouterr().out
    assert "grounding gap" in out and "shuffled" in out and "GFLOP/s" in out
    assert Image.open(tmp_path / "report.png").size > (600, 400)
    assert demo.main(argv) == 0
    assert "Epoch:[" not in capfd.readouterr().out  # nothing is trained twice


def test_demo_without_weights_names_the_way(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "LLM", tmp_path / "llm_192.pth")
    assert demo.main([]) == 1
    assert "make from-zero" in capfd.readouterr().err
