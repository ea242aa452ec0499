"""Third stage, for captions: the model learns from its own answers, by how well these agree with
people's (self-critical sequence training).

    python trainer/train_scst_vlm.py --data_path my/captions.jsonl --images_path my/images
    torchrun --nproc_per_node 2 trainer/train_scst_vlm.py --data_path my/captions.jsonl

Records of one picture are each other's references: give several captions of each. Weights go to
`out/`, the state to resume from to `checkpoints/`; Ctrl-C saves before it leaves.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.run.setup import main as run
from trainer.stages import SCST


def main(argv: list[str] | None = None) -> int:
    """Run this stage; returns the exit status."""
    return run(SCST, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
