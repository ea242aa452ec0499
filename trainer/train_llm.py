"""Stage zero: a language model from scratch, by next-token prediction on packed text.

    python trainer/train_llm.py --data_path my/text.txt
    torchrun --nproc_per_node 2 trainer/train_llm.py --data_path my/text.jsonl

Text is a `.txt` or `.md` file with a document a line, or JSONL with `text` or `conversations`. The
weight `out/llm_{hidden}.pth` is where `train_pretrain_vlm.py` starts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.run.setup import main as run
from trainer.stages import LLM


def main(argv: list[str] | None = None) -> int:
    """Run this stage; returns the exit status."""
    return run(LLM, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
