"""If this fails, the tiny vision tower is trained on wrong or held-out scenes, or saved in a folder
that the model cannot load.
"""

import os
import re
import signal
import time
from random import Random

import pytest
import torch
from PIL import Image
from support.scripts import ROOT
from support.warm import Program

from dataset.synthetic.clip_data import (
    WORDS,
    Scenes,
    encode,
    encode_words,
    name_patches,
    pad_ids,
)
from dataset.synthetic.scenes import sample_scene
from model.model_vlm import MiniMindVLM
from model.vision_tower import count_image_tokens, read_tower_shape
from model.vlm_processor import load_tokenizer
from trainer import train_clip_tiny
from trainer.train_clip_tiny import preprocess, word_loss


def test_the_text_half_reads_a_text_at_its_end():
    args = train_clip_tiny.parse_args(["--num_hidden_layers", "1"])
    tokenizer = load_tokenizer()
    model = train_clip_tiny.make_model(args, tokenizer)
    texts = ["top left", "bottom left", "top right"]
    ids, mask = pad_ids([encode(tokenizer, text) for text in [*texts, "top left: small red star"]])
    features = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    first_same, last_same = (features[0] - features[i] for i in (2, 1))
    assert first_same.abs().max() > 1e-3 and last_same.abs().max() > 1e-3
    alone_ids, alone_mask = pad_ids([encode(tokenizer, texts[0])])
    alone = model.get_text_features(input_ids=alone_ids, attention_mask=alone_mask).pooler_output
    torch.testing.assert_close(alone[0], features[0])  # padding changes nothing


def test_word_loss_is_low_where_patches_match_their_words():
    args = train_clip_tiny.parse_args(["--num_hidden_layers", "1", "--projection_dim", "64"])
    tokenizer = load_tokenizer()
    model = train_clip_tiny.make_model(args, tokenizer).eval()
    names = torch.from_numpy(name_patches(sample_scene(Random(0))))[None]
    words = encode_words(tokenizer)
    ids, mask, lengths = words
    texts = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    texts = torch.nn.functional.normalize(texts, dim=-1).split(lengths)
    kind = list(WORDS).index("colour")
    wanted = texts[kind][names[0, kind].clamp(min=0)][None]  # features that are the right words
    model.vision_model.post_layernorm = model.visual_projection = torch.nn.Identity()
    _, shares = word_loss(model, wanted, names, words)
    assert shares[kind] == 1
    wrong = texts[kind][(names[0, kind].clamp(min=0) + 1) % lengths[kind]][None]
    _, shares = word_loss(model, wrong, names, words)
    assert shares[kind] == 0


def test_pixels_are_those_of_the_image_processor():
    scenes = Scenes(4, seed=0, tokenizer=load_tokenizer())
    pictures = torch.stack([picture for picture, _, _ in scenes])
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures]
    expected = train_clip_tiny.PROCESSOR(images=images, return_tensors="pt")["pixel_values"]
    ours = preprocess(pictures)
    torch.testing.assert_close(ours, expected, atol=0.031, rtol=0)  # two of 255
    assert (ours - expected).abs().mean() < 0.003


TIMEOUT_S = 120
TINY = ["--steps", "12", "--batch_size", "8", "--hidden_size", "64", "--num_hidden_layers", "1",
        "--text_hidden_size", "64", "--num_workers", "0", "--log_interval", "6",
        "--warmup_steps", "2", "--device", "cpu"]  # fmt: skip


@pytest.mark.slow
def test_training_writes_a_clip_folder_that_the_model_takes(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(train_clip_tiny, "NUM_HELDOUT", 40)
    assert train_clip_tiny.main([*TINY, "--save_dir", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "step 12/12 loss:" in out and "in-batch:" in out
    assert re.search(r"on pairs never shown: colour:[\d.]+% shape:[\d.]+%", out)
    tower, processor = MiniMindVLM.get_vision_model(tmp_path)
    assert count_image_tokens(read_tower_shape(tmp_path), keep_cls=False) == 196
    pixels = MiniMindVLM.image2tensor(Image.new("RGB", (96, 96), "red"), processor)
    features = MiniMindVLM.get_image_embeddings(pixels, tower)
    assert features.shape == (1, 196, 64) and features.isfinite().all()


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_written(tmp_path, capfd):
    argv = [*TINY, "--save_dir", str(tmp_path / "tower"), "--learning_rate", "1e30"]
    assert train_clip_tiny.main(argv) == 1
    err = capfd.readouterr().err
    assert re.match(r"error: step 6: \S+ is not finite; nothing was written", err)
    assert not any((tmp_path / "tower").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tower", "data"])
def test_ctrl_c_ends_in_one_line(name, tmp_path):
    script = {
        "tower": [
            *"trainer/train_clip_tiny.py --log_interval 1 --num_workers 1 --dtype float32".split(),
            "--save_dir",
            tmp_path / "tower",
        ],
        "data": ["-m", "dataset.synthetic", "--num_images", "100000", "--out", tmp_path / "data"],
    }[name]
    with open(tmp_path / "said", "w+") as said:
        process = Program(*script, cwd=ROOT, stdout=said, stderr=said, leads=True)
        deadline = time.monotonic() + TIMEOUT_S
        while not ("step 1/" in (tmp_path / "said").read_text() or any(tmp_path.rglob("*9.png"))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 130
    *_, last = (tmp_path / "said").read_text().splitlines()
    assert last.startswith("stopped") and "Traceback" not in (tmp_path / "said").read_text()
    assert not any(path.is_file() for path in (tmp_path / "tower").rglob("*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", "50"], "--hidden_size must be a multiple of 64, got 50"),
        (["--text_hidden_size", "0"], "--text_hidden_size must be a multiple of 64, got 0"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--batch_size", "0"], "--batch_size must be 1 or more, got 0"),
        (["--num_workers", "-1"], "--num_workers must be 0 or more, got -1"),
        (["--learning_rate", "nan"], "--learning_rate must be above 0, got nan"),
        (["--save_dir", "file"], "--save_dir file cannot be written"),
        (["--tokenizer_path", "gone"], "no tokenizer: gone"),
        (["--device", "abacus"], "is not a device"),
    ],
)
def test_bad_flag_is_one_line(flags, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    folder = [] if "--save_dir" in flags else ["--save_dir", "tower"]
    assert train_clip_tiny.main([*folder, *flags]) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
