"""If this fails, pictures that travel in 8 bits train another model than the tower's own
preprocessing would."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.towers import PROCESSORS, make_config, make_preprocessing
from transformers import CLIPImageProcessorPil

from model.vision.kinds import KINDS
from model.vision.pixels import pixel_steps
from model.vision.preprocessing import default_image_processor
from model.vision.resampling import FILTERS, taps
from model.vision_tower import load_image_processor

SIZES = ((128, 128), (640, 480), (90, 200), (37, 5), (1, 1), (32, 32), (300, 32), (3, 290))


def make_jpeg(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def jpegs():
    return [make_jpeg(*size) for size in SIZES]


def library_numbers(processor, jpeg: bytes) -> torch.Tensor:
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return processor(images=picture, return_tensors="pt")["pixel_values"]


def check_same_bits(processor, jpegs) -> None:
    small = pixel_steps(processor, keeps_small=True)
    assert small is not None
    for jpeg in jpegs:
        expected = library_numbers(processor, jpeg)
        for steps in (small, replace(small, keeps_small=False)):
            pixels = steps.look([jpeg])
            assert pixels.dtype == torch.uint8
            assert torch.equal(steps.numbers(pixels), expected)
            assert torch.equal(steps.numbers(steps.at_side(pixels)), expected)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_8_bit_pixels_become_the_numbers_of_each_kinds_folder(kind, tmp_path, jpegs):
    make_preprocessing(kind, tmp_path)
    config = make_config(kind)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    check_same_bits(load_image_processor(tmp_path, config), jpegs)


@pytest.mark.parametrize("kind", sorted({kind.processor for kind in KINDS.values()}))
def test_8_bit_pixels_become_the_numbers_of_each_library_class_in_full_size(kind, jpegs):
    check_same_bits(default_image_processor(kind, 224, is_imagenet=False), jpegs[:2])


def test_small_pictures_travel_as_they_are_and_large_ones_resized(jpegs):
    processor = default_image_processor("CLIPImageProcessor", 224, is_imagenet=False)
    steps = pixel_steps(processor, keeps_small=True)
    assert steps.look(jpegs[:1]).shape == (1, 3, 128, 128)
    assert steps.look([jpegs[0], jpegs[0]]).shape == (2, 3, 128, 128)
    assert steps.look(jpegs[1:2]).shape == (1, 3, 224, 224)
    assert steps.look([jpegs[0], jpegs[2]]).shape == (2, 3, 224, 224)  # of two sizes
    assert steps.look([]).shape == (0, 3, 224, 224)


@pytest.mark.parametrize("resample", FILTERS)
def test_resizing_by_whole_numbers_gives_pillows_bits(resample):
    rng = np.random.default_rng(0)
    for _ in range(60):
        width, height, wide, tall = rng.integers(3, 250, 4).tolist()
        # Extremes make a bicubic filter overshoot, so that both clips count.
        pixels = rng.choice(np.array([0, 3, 128, 255], dtype=np.uint8), (height, width, 3))
        expected = np.asarray(Image.fromarray(pixels).resize((wide, tall), resample))
        rows = taps(width, wide, resample=resample).along(
            torch.from_numpy(pixels).permute(2, 0, 1)[None], 3
        )
        found = taps(height, tall, resample=resample).along(rows, 2)
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_pad": True, "pad_size": {"height": 300, "width": 300}},
        {"size": {"shortest_edge": 200}},  # less than the crop: the library pads with black
        {"size": {"shortest_edge": 224, "longest_edge": 300}},
        {"do_resize": False},
    ],
)
def test_steps_that_are_not_known_are_left_to_the_library(options):
    assert pixel_steps(CLIPImageProcessorPil(**options)) is None
