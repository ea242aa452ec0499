"""Owns the settings of the chain on the sample world; a folder holds the files of one setting."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.machine.paths import OUT_DIR
from model.vision_tower import VISION_DIR

TOWER, LLM, VLM = "clip-tiny-patch16", "llm_demo_128", "sft_vlm_demo_128"  # as the repository has
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
SEED = 42


@dataclass(frozen=True)
class Recipe:
    """How a stage with images trains: the values of its flags."""

    batch_size: int
    learning_rate: float
    warmup_steps: int
    optimizer: str


@dataclass(frozen=True)
class Chain:
    """Where a chain works and how long it trains; the defaults are those of `make demo`."""

    folder: Path = OUT_DIR / "demo"
    tower: Path = VISION_DIR / TOWER
    llm: Path = OUT_DIR / f"{LLM}.pth"
    seed: int = SEED  # of order and new weights
    num_pretrain: int = 1000  # pictures of the first stage
    num_train: int = 6000  # of the second; a twentieth as many questions have no picture
    num_turns: int = 5  # questions per picture, at most
    num_listed: int = 16  # pieces of the list that ends a record
    caption_share: float = 0.1  # of the pictures also have a caption
    pretrain: Recipe = Recipe(4, 6e-3, 0, "muon")
    sft: Recipe = Recipe(4, 1e-3, 100, "muon")
    num_heldout: int = 400
    tower_steps: int = 0
    text_share: float = 1.0  # of the texts of `TEXT_STAGES`

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def pretrain_data(self) -> Path:
        return self.data / "pretrain"

    @property
    def out(self) -> Path:
        """Where the stages with images write; each seed but the default has its own folder."""
        return self.folder if self.seed == SEED else self.folder / f"seed_{self.seed}"


@dataclass(frozen=True)
class TextStage:
    """One run of the language model from zero."""

    name: str  # of its weight
    flag: str  # of dataset.synthetic: which texts
    count: int
    seed: int
    batch_size: int
    learning_rate: float
    character_share: float = 0.0  # of the scenes with room for one show a character to read


TEXT_STAGES = (
    TextStage("llm_told", "--num_retold", 16000, 11, 32, 3e-3),
    TextStage("llm_demo", "--num_text", 40000, 11, 16, 2e-3, 0.6),
)
FROM_ZERO: dict[str, Any] = {  # what differs in `make from-zero`
    "folder": OUT_DIR / "from_zero",
    "tower": OUT_DIR / "from_zero" / TOWER,
    "llm": OUT_DIR / "from_zero" / f"{LLM}.pth",
    "num_pretrain": 4000,
    "num_train": 32000,
    "num_turns": 8,
    "num_listed": 10,
    "caption_share": 0.2,
    "pretrain": Recipe(16, 3e-3, 0, "adamw"),
    "sft": Recipe(8, 1.5e-3, 100, "muon"),
    "num_heldout": 1100,
    "tower_steps": 3500,
}


def chain_settings(chain: Chain, *, is_from_zero: bool) -> dict[str, Any]:
    """Everything that the files in a chain's folder depend on.

    Not the seed (each seed has its own folder) nor the paths; the hashes of tower and language
    model unless the chain trains them itself.
    """
    settings = asdict(chain)
    for name in ("seed", "folder", "tower", "llm"):
        del settings[name]
    if is_from_zero:
        settings["texts"] = [asdict(stage) for stage in TEXT_STAGES]
    else:
        for name, file in (("tower", chain.tower / "model.safetensors"), ("llm", chain.llm)):
            settings[f"{name}_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return settings
