"""First stage: the projection learns to describe images to a frozen language model.

    python trainer/train_pretrain_vlm.py
    torchrun --nproc_per_node 2 trainer/train_pretrain_vlm.py

Weights go to `out/`, the state to resume from to `checkpoints/`; Ctrl-C saves before it leaves.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.run.setup import main as run
from trainer.train_args import Stage

STAGE = Stage(
    name="pretrain",
    title="Pretrain",
    data_kind="pretrain",
    defaults={
        "epochs": 4,
        "batch_size": 16,
        "learning_rate": 4e-4,
        "max_seq_len": 640,
        "freeze_llm": 1,
        "from_weight": "llm",
        "save_weight": "pretrain_vlm",
        "wandb_project": "MiniMind-V-Pretrain",
    },
    third={"epochs": 2, "max_seq_len": 450, "freeze_llm": 2, "save_interval": 1000},
)


def main(argv: list[str] | None = None) -> int:
    """Run this stage; returns the exit status."""
    return run(STAGE, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
