"""Owns the steps of the chain on the sample world: each runs scripts of the repository, and skips
what is already there.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.generations import MODEL_DIR
from model.machine.paths import OUT_DIR, ROOT
from model.vision_tower import VISION_DIR
from trainer.chain.running import Word, flags, run_script, scores_of
from trainer.chain.settings import LLM, SIZES, TEXT_STAGES, TOWER, VLM, Chain, TextStage
from trainer.chain.taught import TAUGHT, add_taught

TEXTS_PER_HELDOUT = 50  # training texts for each held-out one


def make_pictures(folder: Path, split: str, num_images: int, options: dict[str, Word]) -> None:
    """Pictures of a split with their questions."""
    if not (folder / f"{split}.jsonl").is_file():
        where: dict[str, Word] = {"out": folder, "split": split, "num_images": num_images}
        run_script("-m", "dataset.synthetic", *flags(where | {"num_pairs": 0} | options))


def make_data(chain: Chain) -> None:
    """Pictures for both stages and held-out ones, with their questions."""
    training: dict[str, Word] = {
        "caption_share": chain.caption_share,
        "list_share": 1,
        "num_listed": chain.num_listed,
        "num_turns": chain.num_turns,
    }
    num_blind = chain.num_train // 20
    make_pictures(chain.pretrain_data, "train", chain.num_pretrain, training | {"seed": 1})
    make_pictures(chain.data, "train", chain.num_train, training | {"num_blind": num_blind})
    make_pictures(chain.data, "heldout", chain.num_heldout, {})


def train_tower(chain: Chain) -> None:
    """Train the vision tower on pictures, captions and words."""
    if not (chain.tower / "preprocessor_config.json").is_file():  # written last
        options: dict[str, Word] = {
            "save_dir": chain.tower,
            "steps": chain.tower_steps,
            "tokenizer_path": MODEL_DIR,
        }
        run_script("trainer/train_clip_tiny.py", *flags(options))


def make_texts(chain: Chain, stage: TextStage) -> Path:
    """Training and held-out texts of a stage of the language model; returns their folder."""
    folder = chain.data / stage.name
    num_train = round(stage.count * chain.text_share)
    num_heldout = max(1, num_train // TEXTS_PER_HELDOUT)
    for split, num_texts in (("heldout", num_heldout), ("train", num_train)):
        if not (folder / f"{split}_text.jsonl").is_file():
            options: dict[str, Word] = {
                "out": folder,
                "split": split,
                "seed": stage.seed,
                "num_images": 1,
                "num_pairs": 0,
                "caption_share": 0.1,
                "character_share": stage.character_share,
            }
            run_script("-m", "dataset.synthetic", *flags(options), stage.flag, num_texts)
    return folder


def train_llm(chain: Chain) -> None:
    """Train the language model: first on scenes described many times over, then on questions about
    described scenes.
    """
    start = "none"
    for stage in TEXT_STAGES:
        texts = make_texts(chain, stage)
        options: dict[str, Word] = {
            **SIZES,
            "max_seq_len": 340,
            "loss_on": "answers",
            "data_path": texts / "train_text.jsonl",
            "val_data_path": texts / "heldout_text.jsonl",
            "batch_size": stage.batch_size,
            "learning_rate": stage.learning_rate,
            "warmup_steps": 50,
            "log_interval": 50,
            "dtype": "float32",
            "num_workers": 0,
            "tokenizer_path": MODEL_DIR,
            "save_dir": chain.folder,
            "checkpoint_dir": chain.folder,
            "from_weight": start,
            "save_weight": stage.name,
            "from_resume": 1,
        }
        run_script("trainer/train_llm.py", *flags(options))
        start = stage.name


def train(chain: Chain) -> None:
    """Both stages with images; one that is complete ends at once."""
    common: dict[str, Word] = {
        "vision_model_path": chain.tower,
        "save_dir": chain.out,
        "checkpoint_dir": chain.out,
        "seed": chain.seed,
        "epochs": 1,
        "dtype": "float32",
        "log_interval": 20,
        "save_interval": 500,
        "num_workers": 1,
        "from_resume": 1,
    }
    pretrain: dict[str, Word] = {
        "data_path": chain.pretrain_data / "train.jsonl",
        "images_path": chain.pretrain_data / "train_images",
        **asdict(chain.pretrain),
        "from_weight": chain.llm,
        "save_weight": "pretrain_vlm_demo",
    }
    sft: dict[str, Word] = {
        "data_path": chain.data / "train.jsonl",
        "images_path": chain.data / "train_images",
        **asdict(chain.sft),
        "from_weight": "pretrain_vlm_demo",
        "hidden_size": 128,
        "save_weight": "sft_vlm_demo",
    }
    run_script("trainer/train_pretrain_vlm.py", *flags(common | pretrain))
    run_script("trainer/train_sft_vlm.py", *flags(common | sft))
    add_taught(chain.out / f"{VLM}.pth", TAUGHT)


def evaluate(chain: Chain) -> dict[str, Any]:
    """Score the held-out questions, unless this weight's scores are there; returns them."""
    options: dict[str, Word] = {
        "weight": chain.out / f"{VLM}.pth",
        "vision_model_path": chain.tower,
        "data_path": chain.data / "heldout.jsonl",
        "images_path": chain.data / "heldout_images",
    }
    return scores_of(options, path=chain.out / "scores.json", run=run_script)


def publish(chain: Chain) -> None:
    """Copy what a chain from zero made to where the repository keeps its own weights."""
    shutil.copytree(chain.tower, VISION_DIR / TOWER, dirs_exist_ok=True)
    for stem, source in ((LLM, chain.folder), (VLM, chain.out)):
        shutil.copy(source / f"{stem}.pth", OUT_DIR)
        about = json.loads((source / f"{stem}.json").read_text(encoding="utf-8"))
        about.pop("former", None)  # the previous save: needed only while a save may be cut off
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        text = text.replace(f"{ROOT}{os.sep}", "")  # paths of this machine concern nobody
        (OUT_DIR / f"{stem}.json").write_text(text, encoding="utf-8")
    print(f"published: {VISION_DIR / TOWER}, {OUT_DIR / LLM}.pth, {OUT_DIR / VLM}.pth")
