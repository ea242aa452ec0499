"""Second stage: language model and projection learn to follow instructions about images.

    python trainer/train_sft_vlm.py
    torchrun --nproc_per_node 2 trainer/train_sft_vlm.py

Weights go to `out/`, the state to resume from to `checkpoints/`; Ctrl-C saves before it leaves.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.run.setup import main as run
from trainer.train_args import Stage

STAGE = Stage(
    name="sft",
    title="SFT",
    data_kind="sft",
    defaults={
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-6,
        "max_seq_len": 1536,
        "freeze_llm": 0,
        "from_weight": "pretrain_vlm",
        "save_weight": "sft_vlm",
        "wandb_project": "MiniMind-V-SFT",
    },
    third={"learning_rate": 5e-6, "max_seq_len": 768, "freeze_llm": 1, "save_interval": 1000},
)


def main(argv: list[str] | None = None) -> int:
    """Run this stage; returns the exit status."""
    return run(STAGE, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
