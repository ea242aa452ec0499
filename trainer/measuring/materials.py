"""Owns what a benchmark trains on: pictures, records and a tower, as large as real ones."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import logging

PICTURE_SIDE = 128  # pixels, as in the published data
NUM_PICTURES = 256  # different ones; records share them
JPEG_QUALITY = 85
WORDS = "a dog runs over the green grass while two people watch it from an old wooden bench".split()
# Words of an answer, from and to: captions, and answers to instructions.
ANSWER_WORDS = {"pretrain": (8, 40), "sft": (20, 160)}
QUESTION = "<image>\nDescribe this picture."


TOWERS: dict[int, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {  # by generation
    2: (
        lambda: CLIPVisionModel(CLIPVisionConfig(patch_size=16)),
        {"image_processor_type": "CLIPImageProcessor"},
    ),
    3: (
        lambda: SiglipVisionModel(SiglipVisionConfig(image_size=256, patch_size=32)),
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 256, "width": 256}},
    ),
}


def make_tower(folder: Path, *, generation: int) -> None:
    """The generation's usual tower, ViT-B, with random weights, and its preprocessing."""
    make, preprocessing = TOWERS[generation]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = make()
    logging.disable_progress_bar()
    tower.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))


def make_picture(seed: int) -> bytes:
    """A JPEG as large as that of a photo of `PICTURE_SIDE`: blurred noise with some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 8, smooth.shape)
    picture = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def make_records(folder: Path, *, stage: str, num_records: int) -> tuple[Path, Path]:
    """Records with a picture and an answer each; returns the data file and the folder of images."""
    images = folder / "images"
    images.mkdir()
    for number in range(min(NUM_PICTURES, num_records)):
        (images / f"{number}.jpg").write_bytes(make_picture(number))
    rng, (least, most) = Random(0), ANSWER_WORDS[stage]
    lines = []
    for number in range(num_records):
        answer = " ".join(rng.choices(WORDS, k=rng.randint(least, most)))
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"conversations": turns, "image": f"{number % NUM_PICTURES}.jpg"}))
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data, images
