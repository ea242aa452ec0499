"""Owns the settings of the chain on photos: what trains, and how it is scored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.machine.paths import OUT_DIR, ROOT
from model.vision_tower import VISION_DIR
from model.vlm_processor import OWN_TOKENIZER_DIR
from trainer.chain.running import Word

DATA = ROOT / "dataset" / "flickr8k"  # where `dataset/download.py flickr8k` puts it
TOWER = VISION_DIR / "efficientnet-lite0"
WEIGHT = "photos"  # its name, without the width
CAPTIONS_WEIGHT = "photos_sft"  # that it begins with: what learning the captions gave
SEED = 42
NUM_BEAMS = 5

MODEL: dict[str, Word] = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,  # as many as of keys: each image token's value has the full width
    "projector": "mlp",
    # Before the tower's last layer there are 8 x 8 patches, 320 wide; four make an image token.
    "image_size": 256,
    "vision_layer": -1,
    "token_merge": 2,
}
# Byte-level BPE of the training captions alone: whole words, so a record has a third fewer tokens.
TOKENIZER: dict[str, Word] = {
    "damping": 1,
    "num_scenes": 0,
    "hanzi_weight": 0,
    "template_weight": 10_000,
    "max_token_bytes": 12,
    "allow_fewer": 1,
}
RECIPE: dict[str, Word] = {
    "dropout": 0.05,
    "batch_size": 32,
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "warmup_steps": 200,
    "epochs": 3,
    "pack": 1,
}
# Then it learns from its own answers; a fifth of the records is two prompts of each photo.
REWARDS: dict[str, Word] = {
    "batch_size": 32,
    "learning_rate": 3e-4,
    "warmup_steps": 10,
    "epochs": 1,
    "pack": 1,
}
PROMPTS_SHARE = 0.2


@dataclass(frozen=True)
class Photos:
    """Where the chain works, and on what.

    Args:
        data: a folder with `train` and `val`, each with `data.jsonl` and `images.zip`.
        num_cut: training photos that are not trained on and take the place of the validation
            photos: for choices, so that these stay unseen.
    """

    data: Path = DATA
    folder: Path = OUT_DIR / "photos"
    tower: Path = TOWER
    seed: int = SEED
    num_cut: int = 0
    epochs: int = int(RECIPE["epochs"])

    @property
    def out(self) -> Path:
        """Where training and scores go; each seed but the default has its own folder."""
        return self.folder if self.seed == SEED else self.folder / f"seed_{self.seed}"

    @property
    def cut(self) -> Path:
        """Folder of the records that are left after the cut, and of those that were cut."""
        return self.folder / "cut"

    @property
    def weight(self) -> Path:
        return self.out / f"{WEIGHT}_{MODEL['hidden_size']}.pth"

    @property
    def captions_weight(self) -> Path:
        """What the captions alone have taught."""
        return self.out / f"{CAPTIONS_WEIGHT}_{MODEL['hidden_size']}.pth"

    @property
    def tokenizer(self) -> Path:
        """Where whoever loads the weight looks for its tokenizer."""
        return self.out / OWN_TOKENIZER_DIR

    @property
    def examples(self) -> Path:
        """The held-back photos of the report, for the page to show."""
        return self.out / "examples"

    @property
    def features(self) -> Path:
        """The kept features of the tower, of all seeds."""
        return self.folder / "features"

    def settings(self) -> dict[str, Any]:
        """Everything that the files in the folder depend on, but the seed and the paths."""
        recipe = RECIPE | {"epochs": self.epochs}
        return {
            "model": MODEL,
            "tokenizer": TOKENIZER,
            "recipe": recipe,
            "rewards": REWARDS | {"share": PROMPTS_SHARE},
            "num_cut": self.num_cut,
            "num_beams": NUM_BEAMS,
        }
