"""Owns the steps of the chain on photos: each runs scripts of the repository, and skips what is
already there.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import IO, Any
from zipfile import is_zipfile

from model.machine.atomic_file import atomic_write
from trainer.chain.photo_settings import (
    CAPTIONS_WEIGHT,
    MODEL,
    NUM_BEAMS,
    PROMPTS_SHARE,
    RECIPE,
    REWARDS,
    TOKENIZER,
    TOWER,
    WEIGHT,
    Photos,
)
from trainer.chain.running import Word, flags, run_script, scores_of
from trainer.chain.taught import PHOTOS_TAUGHT, add_taught

ALL = 10**9  # answers to generate: one for every photo and language
SPLITS = ("train", "val")


def check_inputs(photos: Photos) -> None:
    """Look at data and tower before anything is written.

    Raises:
        FileNotFoundError: a file is missing; says how to get it.
        ValueError: a file is damaged, or there are not enough photos for the cut.
    """
    for split in SPLITS:
        for name in ("data.jsonl", "images.zip"):
            path = photos.data / split / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing; fetch the photos by `python dataset/download.py "
                    "flickr8k`, or name their folder by --data / 缺少照片数据"
                )
            is_whole = path.stat().st_size > 0 if name == "data.jsonl" else is_zipfile(path)
            if not is_whole:
                raise ValueError(f"{path} is empty or damaged; fetch it again / 文件损坏")
    if photos.tower != TOWER and not (photos.tower / "config.json").is_file():
        raise FileNotFoundError(
            f"--tower {photos.tower} has no config.json, so it is no tower; leave the flag out to "
            "fetch the usual one / 视觉塔目录无效"
        )
    if photos.num_cut:
        names = {name for _, name in read_lines(photos) if name}
        if len(names) <= photos.num_cut:
            raise ValueError(f"--num_cut {photos.num_cut}: there are {len(names)} training photos")


def fetch_tower(photos: Photos) -> None:
    """The tower of the registry, where the folder has none."""
    if not (photos.tower / "config.json").is_file():
        run_script("dataset/download.py", "photo_tower", "--yes")


def read_lines(photos: Photos) -> list[tuple[str, str]]:
    """The training records, each with the name of its photo; "" where it has none.

    Raises:
        ValueError: a line is no record.
    """
    path = photos.data / "train" / "data.jsonl"
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            image = json.loads(line).get("image") or ""
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is no JSON object ({error})") from None
        found.append((line, image if isinstance(image, str) else json.dumps(image)))
    return found


def cut_records(photos: Photos) -> None:
    """Divide the training records by photo: `num_cut` photos, chosen by a hash of their names, and
    the rest."""
    lines = read_lines(photos)
    names = {name for _, name in lines if name}
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set(ordered[: photos.num_cut])
    photos.cut.mkdir(exist_ok=True)
    for split, is_cut in (("train", False), ("val", True)):
        text = "".join(f"{line}\n" for line, name in lines if (name in chosen) == is_cut)
        atomic_write(records(photos, split)[0], partial(_write_text, text))


def _write_text(text: str, file: IO[bytes]) -> None:
    file.write(text.encode())


def records(photos: Photos, split: str) -> tuple[Path, Path]:
    """Data file and images of a split; after a cut both come out of the training photos."""
    if photos.num_cut:
        return photos.cut / f"{split}.jsonl", photos.data / "train" / "images.zip"
    return photos.data / split / "data.jsonl", photos.data / split / "images.zip"


def train_tokenizer(photos: Photos) -> None:
    """A tokenizer of the training captions, unless it is there."""
    if not (photos.tokenizer / "tokenizer_config.json").is_file():  # written last
        data, _ = records(photos, "train")
        options: dict[str, Word] = {**TOKENIZER, "data_path": data, "save_dir": photos.tokenizer}
        run_script("trainer/train_tokenizer.py", *flags(options))


def train(photos: Photos) -> None:
    """The language model and the projection, from nothing; a complete run ends at once."""
    data, _ = records(photos, "train")
    options: dict[str, Word] = {
        **MODEL,
        **RECIPE,
        "epochs": photos.epochs,
        "data_path": data,
        "from_weight": "none",
        "save_weight": CAPTIONS_WEIGHT,
        "tokenizer_path": photos.tokenizer,
    }
    run_script("trainer/train_sft_vlm.py", *flags(options | _common(photos)))


def learn_from_answers(photos: Photos) -> None:
    """Its own answers, by how well they agree with the captions; a complete run ends at once."""
    data, _ = records(photos, "train")
    options: dict[str, Word] = {
        **REWARDS,
        "data_path": f"{data}:{PROMPTS_SHARE}",
        "from_weight": photos.captions_weight,
        "save_weight": WEIGHT,
        "hidden_size": MODEL["hidden_size"],
    }
    run_script("trainer/train_scst_vlm.py", *flags(options | _common(photos)))
    add_taught(photos.weight, PHOTOS_TAUGHT)


def _common(photos: Photos) -> dict[str, Word]:
    """What both trainings are given."""
    return {
        "images_path": records(photos, "train")[1],
        "vision_model_path": photos.tower,
        "cache_vision_features": photos.features,
        "freeze_llm": 0,
        "save_dir": photos.out,
        "checkpoint_dir": photos.out,
        "seed": photos.seed,
        "log_interval": 50,
        "save_interval": 500,
        "num_workers": 1,
        "from_resume": 1,
    }


def evaluate(photos: Photos) -> dict[str, Any]:
    """Score the held-back photos, unless this weight's scores on these are there; returns them."""
    data, images = records(photos, "val")
    options: dict[str, Word] = {
        "weight": photos.weight,
        "vision_model_path": photos.tower,
        "data_path": data,
        "images_path": images,
        "cache_vision_features": photos.features,
        "num_beams": NUM_BEAMS,
        "num_generate": ALL,
        "batch_size": 32,
    }
    return scores_of(options, path=photos.out / "scores.json", run=run_script)
