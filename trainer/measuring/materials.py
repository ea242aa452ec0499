"""Owns what a benchmark trains on: pictures, records and a tower, as large as real ones."""

import io
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model.generations import GENERATIONS

PICTURE_SIDE = 128  # pixels, as in the published data
NUM_PICTURES = 256  # different ones; records share them
JPEG_QUALITY = 85
WORDS = "a dog runs over the green grass while two people watch it from an old wooden bench".split()
# Words of an answer, from and to: captions, and answers to instructions.
ANSWER_WORDS = {"pretrain": (8, 40), "sft": (20, 160)}
QUESTION = "<image>\nDescribe this picture."


def make_tower(folder: Path, *, generation: int) -> None:
    """The generation's usual tower, ViT-B, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if generation == 2:
            CLIPVisionModel(CLIPVisionConfig(patch_size=16)).save_pretrained(folder)
            CLIPImageProcessor().save_pretrained(folder)
        else:
            # 8 x 8 patches are the generation's image tokens.
            sizes: dict[str, Any] = {"image_size": 256, "patch_size": 32}
            SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(folder)
            size = {"height": 256, "width": 256}
            SiglipImageProcessor(size=size).save_pretrained(folder)
    assert GENERATIONS[generation].config["image_token_len"] in (196, 64)


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
