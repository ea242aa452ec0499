"""Owns the steps of the chain on photos: each runs scripts of the repository, and skips what is
already there.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from model.machine.atomic_file import atomic_write
from trainer.chain.photo_settings import MODEL, NUM_BEAMS, RECIPE, TOWER, WEIGHT, Photos
from trainer.chain.running import Word, flags, run_script

ALL = 10**9  # answers to generate: one for every photo and language
SPLITS = ("train", "val")


def check_data(photos: Photos) -> None:
    """Raise FileNotFoundError, saying how to get them, unless both splits are there."""
    for split in SPLITS:
        for name in ("data.jsonl", "images.zip"):
            if not (photos.data / split / name).is_file():
                raise FileNotFoundError(
                    f"{photos.data / split / name} is missing; fetch the photos by `python "
                    "dataset/download.py flickr8k`, or name their folder by --data / 缺少照片数据"
                )


def fetch_tower(photos: Photos) -> None:
    """The tower of the registry, where the default folder has none.

    Raises:
        FileNotFoundError: another folder has none.
    """
    if (photos.tower / "config.json").is_file():
        return
    if photos.tower != TOWER:
        raise FileNotFoundError(
            f"--tower {photos.tower} has no config.json, so it is no tower; leave the flag out to "
            "fetch the usual one / 视觉塔目录无效"
        )
    run_script("dataset/download.py", "photo_tower", "--yes")


def cut_records(photos: Photos) -> None:
    """Divide the training records by photo: `num_cut` photos, chosen by a hash of their names, and
    the rest.

    Raises:
        ValueError: there are no more photos than that.
    """
    lines = (photos.data / "train" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    names = [json.loads(line)["image"] for line in lines]
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(ordered) <= photos.num_cut:
        raise ValueError(f"--num_cut {photos.num_cut}: there are {len(ordered)} training photos")
    chosen = set(ordered[: photos.num_cut])
    photos.cut.mkdir(exist_ok=True)
    for split, is_cut in (("train", False), ("val", True)):
        kept = [line for line, n in zip(lines, names, strict=True) if (n in chosen) == is_cut]
        text = "".join(f"{line}\n" for line in kept).encode()
        atomic_write(records(photos, split)[0], lambda file, text=text: file.write(text))


def records(photos: Photos, split: str) -> tuple[Path, Path]:
    """Data file and images of a split; after a cut both come out of the training photos."""
    if photos.num_cut:
        return photos.cut / f"{split}.jsonl", photos.data / "train" / "images.zip"
    return photos.data / split / "data.jsonl", photos.data / split / "images.zip"


def train(photos: Photos) -> None:
    """The language model and the projection, from nothing; a complete run ends at once."""
    data, images = records(photos, "train")
    options: dict[str, Word] = {
        **MODEL,
        **RECIPE,
        "epochs": photos.epochs,
        "data_path": data,
        "images_path": images,
        "vision_model_path": photos.tower,
        "cache_vision_features": photos.features,
        "from_weight": "none",
        "freeze_llm": 0,
        "save_dir": photos.out,
        "checkpoint_dir": photos.out,
        "save_weight": WEIGHT,
        "seed": photos.seed,
        "log_interval": 50,
        "save_interval": 500,
        "num_workers": 1,
        "from_resume": 1,
    }
    run_script("trainer/train_sft_vlm.py", *flags(options))


def evaluate(photos: Photos) -> dict[str, Any]:
    """Score the held-back photos, unless scores of this weight are there; returns the scores."""
    data, images = records(photos, "val")
    path = photos.out / "scores.json"
    if path.is_file() and path.stat().st_mtime_ns > photos.weight.stat().st_mtime_ns:
        scores: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return scores
    options: dict[str, Word] = {
        "weight": photos.weight,
        "vision_model_path": photos.tower,
        "data_path": data,
        "images_path": images,
        "cache_vision_features": photos.features,
        "num_beams": NUM_BEAMS,
        "num_generate": ALL,
        "batch_size": 32,
        "json": path,
    }
    run_script("eval_vlm.py", *flags(options))
    scores = json.loads(path.read_text(encoding="utf-8"))
    return scores
