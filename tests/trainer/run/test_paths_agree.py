"""If this fails, a faster way to train is not the same training: other losses than the plain way,
or a resumed run that ends with other bits than an uninterrupted one.
"""

import json
from pathlib import Path

import pytest
import torch
from support.noise import make_noise_records
from support.scripts import train_flags
from support.states import assert_same_state, leave_at, saved
from support.tiny_parts import make_tower
from transformers import CLIPImageProcessorPil

from trainer import train_pretrain_vlm
from trainer.run import build

FAST = {"num_hidden_layers": 2, "learning_rate": 0.003, "batch_size": 5}
STEPS_AN_EPOCH = 4  # 20 records
# Of the mean loss: in bfloat16 in nats, in float32 relative.
BARS = {"bfloat16": 1e-3, "float32": 1e-5}
# Name -> flags beside those of the plain way, and whether its bits are equal.
PATHS = {
    "8-bit": ({}, True),
    "checkpointed": ({"gradient_checkpointing": 1}, True),
    "packed": ({"pack": 1}, False),
    "cached": ({"cache_vision_features": 1}, False),
    "packed-cached-checkpointed": (
        {"pack": 1, "cache_vision_features": 1, "gradient_checkpointing": 1},
        False,
    ),
    "compiled": ({"compile": 1}, False),
}
SHORT = (("8-bit", "float32"), *(("packed-cached-checkpointed", dtype) for dtype in BARS))
CASES = [
    pytest.param(path, dtype, marks=() if (path, dtype) in SHORT else pytest.mark.full)
    for path in PATHS
    for dtype in BARS
]


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> tuple[Path, Path]:
    return make_noise_records(tmp_path_factory.mktemp("noise"))[:2]


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    """Its pictures are larger than those of the records, so that these may stay small."""
    folder = tmp_path_factory.mktemp("tower")
    make_tower(folder, image_size=64, patch_size=16)
    return folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr("trainer.run.report.draw_curves", lambda _paths: None)


@pytest.fixture(params=[20, pytest.param(200, marks=pytest.mark.full)], scope="module")
def num_steps(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def plain(num_steps, assets, tower, noise, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The losses of the plain way by dtype: padded, pictures through the library."""
    losses = {}
    for dtype in BARS:
        folder = tmp_path_factory.mktemp(dtype)
        flags = {"dtype": dtype, "exact_preprocessing": 1}
        losses[dtype] = train(assets, tower, folder, noise, num_steps=num_steps, **flags)
    return losses


def argv_of(assets, tower, out: Path, noise, **flags) -> list[str]:
    return train_flags(assets, out, *noise, vision_model_path=tower, **(FAST | flags))


def train(assets, tower, out: Path, noise, *, num_steps: int, **flags) -> torch.Tensor:
    """Train in this process; returns the losses in float64."""
    argv = argv_of(assets, tower, out, noise, epochs=num_steps // STEPS_AN_EPOCH, **flags)
    assert train_pretrain_vlm.main(argv) == 0
    lines = (out / "out" / "pretrain_vlm_32_metrics.jsonl").read_text().splitlines()
    losses = [figures["loss"] for figures in map(json.loads, lines) if "loss" in figures]
    assert len(losses) == num_steps
    return torch.tensor(losses, dtype=torch.float64)


def small_pictures_travel(monkeypatch) -> list[tuple[int, ...]]:
    """Let the device resize small pictures, as a GPU does; returns the sizes that it sees."""
    sizes: list[tuple[int, ...]] = []
    make = build.pixel_steps

    class Watched(build.PixelSteps):
        def numbers(self, pixels):
            sizes.append(tuple(pixels.shape[2:]))
            return super().numbers(pixels)

    def make_watched(processor, *, keeps_small):
        steps = make(processor, keeps_small=True)
        return Watched(steps.geometry, steps.side, steps.table, keeps_small=True)

    monkeypatch.setattr(build, "pixel_steps", make_watched)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("path, dtype", CASES)
def test_a_fast_path_has_the_losses_of_the_plain_one(
    path, dtype, num_steps, plain, assets, tower, noise, tmp_path, monkeypatch
):
    flags, has_equal_bits = PATHS[path]
    if "cached" in path and dtype == "float32":
        flags = flags | {"cache_dtype": "float32"}
    monkeypatch.chdir(tmp_path)
    found = train(assets, tower, tmp_path, noise, num_steps=num_steps, dtype=dtype, **flags)
    difference = found - plain[dtype]
    if dtype == "float32":
        difference = difference / plain[dtype]
    mean, most = difference.mean().item(), difference.abs().max().item()
    print(f"{path}, {dtype}, {num_steps} steps: mean {mean:+.1e}, largest {most:.1e}")
    assert abs(mean) <= BARS[dtype]
    assert not has_equal_bits or most == 0
    assert plain[dtype][-1] < plain[dtype][0] - 1, "it has learnt something"


def test_pictures_that_the_device_resizes_train_to_the_same_bits(
    assets, tower, noise, tmp_path, monkeypatch
):
    expected = train(assets, tower, tmp_path / "plain", noise, num_steps=4, exact_preprocessing=1)
    sizes = small_pictures_travel(monkeypatch)
    found = train(assets, tower, tmp_path / "small", noise, num_steps=4)
    assert set(sizes) == {(32, 40)}
    assert torch.equal(found, expected)


def test_what_is_not_known_here_is_left_to_the_library_and_said(
    assets, noise, tower, tmp_path, capfd, monkeypatch
):
    expected = train(assets, tower, tmp_path / "plain", noise, num_steps=4)
    assert "not known here" not in capfd.readouterr().err
    monkeypatch.setattr(build, "pixel_steps", lambda _processor, *, keeps_small: None)
    found = train(assets, tower, tmp_path / "other", noise, num_steps=4)
    assert "same numbers, slower loading" in "".join(capfd.readouterr())
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "flags",
    [
        {"gradient_checkpointing": 1},
        pytest.param({"exact_preprocessing": 1}, marks=pytest.mark.slow),
        pytest.param({"compile": 1}, marks=pytest.mark.full),
    ],
    ids=["checkpointed", "exact-to-8-bit", "compiled"],
)
def test_a_resumed_run_has_equal_bits(flags, assets, tower, noise, tmp_path, monkeypatch):
    """Packed and cached ones: `test_resume.py` and `test_features.py`."""
    flags = {"dropout": 0.1, "epochs": 2, "save_interval": 2} | flags
    whole = argv_of(assets, tower, tmp_path / "whole", noise, **flags)
    assert train_pretrain_vlm.main(whole) == 0
    leave_at(monkeypatch, 5)
    assert train_pretrain_vlm.main(argv_of(assets, tower, tmp_path / "cut", noise, **flags)) == 130
    monkeypatch.undo()
    flags.pop("exact_preprocessing", None)  # the pixels are the same, so it may be left out
    again = argv_of(assets, tower, tmp_path / "cut", noise, from_resume=1, **flags)
    assert train_pretrain_vlm.main(again) == 0
    states = [saved(tmp_path / side / "checkpoints", "*.pth") for side in ("whole", "cut")]
    assert_same_state(*states)


def test_steps_that_are_not_known_are_told_with_a_way_to_say_so(capfd):
    device = torch.device("cpu")
    assert build.read_pixel_steps(CLIPImageProcessorPil(do_resize=False), device=device) is None
    assert "--exact_preprocessing 1" in capfd.readouterr().err
    assert build.read_pixel_steps(CLIPImageProcessorPil(), device=device) is not None
    assert capfd.readouterr().err == ""
