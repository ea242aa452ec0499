"""First stage: the projection learns to describe images to a frozen language model.

    python trainer/train_pretrain_vlm.py
    torchrun --nproc_per_node 2 trainer/train_pretrain_vlm.py

Weights go to `out/`, the state to resume from to `checkpoints/`; Ctrl-C saves before it leaves.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.run.setup import main as run
from trainer.stages import PRETRAIN


def main(argv: list[str] | None = None) -> int:
    """Run this stage; returns the exit status."""
    return run(PRETRAIN, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
