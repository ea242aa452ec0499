"""Offers records whose pictures all differ, and what a cache of their features holds."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from support.tiny_parts import conversation

from dataset.features.shards import SUFFIX, Layout

PATCHES, WIDTH = 16, 24  # of the tests' tower


def make_noise_records(folder: Path, *, num_records: int = 20) -> tuple[Path, Path, int]:
    """JSONL records about pictures of noise; every fifth has none, every third two. Returns data
    file, image folder and the number of pictures."""
    images = folder / "images"
    images.mkdir(parents=True)
    dice, lines, num_pictures = np.random.default_rng(0), [], 0
    for i in range(num_records):
        names = [f"{i}_{j}.png" for j in range(0 if i % 5 == 4 else 2 if i % 3 == 2 else 1)]
        for name in names:
            pixels = dice.integers(0, 256, (32, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name)
        num_pictures += len(names)
        question = "<image> " * len(names) + "What is in the picture?"
        answer = "A picture. " * (1 + i % 3)
        lines.append(json.dumps(conversation(question, answer, image=names)))
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data, images, num_pictures


def shards_of(cache: Path) -> list[Path]:
    """All shards below a folder, the oldest first."""
    return sorted(cache.rglob("*" + SUFFIX))


def entry_bytes(dtype: str = "float16") -> int:
    return Layout(PATCHES, WIDTH, dtype, b"").entry_bytes


def num_entries(cache: Path) -> int:
    """Whole entries of all shards; a shard that is only beginning has none."""
    return sum(path.stat().st_size // entry_bytes() for path in shards_of(cache))


def slow_tower(seconds: float) -> None:
    """A hook for a process: each batch of features takes so long."""
    import time

    from model.vision.features import FeatureMaker

    real = FeatureMaker.features

    def slowly(self, pixel_values):
        time.sleep(seconds)
        return real(self, pixel_values)

    FeatureMaker.features = slowly
