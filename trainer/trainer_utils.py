"""The names that readers of the original look for, under the file in which it has them.

Each lives where the thing does; nothing in this project imports it from here.
"""

from pathlib import Path

from trainer.loop.randomness import setup_seed
from trainer.loop.sample_order import SkipBatchSampler
from trainer.loop.schedule import get_lr
from trainer.ranks.group import Logger, init_distributed_mode, is_main_process
from trainer.run.build import init_vlm_model
from trainer.saving.state_file import load_state, save_state

__all__ = [
    "Logger",
    "SkipBatchSampler",
    "get_lr",
    "init_distributed_mode",
    "init_vlm_model",
    "is_main_process",
    "setup_seed",
    "vlm_checkpoint",
]


def vlm_checkpoint(
    path: Path,
    state: dict | None = None,
    *,
    identity: dict,
    former_identity: dict | None = None,
    is_first: bool = False,
) -> dict | None:
    """Save a training state, or load one with `state=None`; see `save_state` and `load_state`."""
    if state is None:
        return load_state(path, identity=identity, former_identity=former_identity)
    save_state(path, state, identity=identity, is_first=is_first)
    return None
