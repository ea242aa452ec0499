"""Second stage: language model and projection learn to follow instructions about images.

    python trainer/train_sft_vlm.py
    torchrun --nproc_per_node 2 trainer/train_sft_vlm.py

Weights go to `out/`, the state to resume from to `checkpoints/`; Ctrl-C saves before it leaves.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.run.setup import main as run
from trainer.stages import SFT


def main(argv: list[str] | None = None) -> int:
    """Run this stage; returns the exit status."""
    return run(SFT, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
