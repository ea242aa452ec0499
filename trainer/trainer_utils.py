"""The names that readers of the original project look for in this file.

Each is defined elsewhere; nothing in this project imports it from here.
"""

from pathlib import Path
from typing import Any

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
    state: dict[str, Any] | None = None,
    *,
    identity: dict[str, Any],
    former_identity: dict[str, Any] | None = None,
    is_first: bool = False,
) -> dict[str, Any] | None:
    """Save a training state, or load one with `state=None`; see `save_state` and `load_state`."""
    if state is None:
        return load_state(path, identity=identity, former_identity=former_identity)
    save_state(path, state, identity=identity, is_first=is_first)
    return None
