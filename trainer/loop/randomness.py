"""Owns random numbers of training: seeds, and the state of the generators that a run saves."""

import random
from typing import Any

import numpy as np
import torch


def setup_seed(seed: int) -> None:
    """Seed every generator that training uses."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA and MPS too


def seed_rank(seed: int, *, samples: int, rank: int) -> None:
    """Seed the generators of one rank from the seed, the samples that the run has consumed, and
    the rank."""
    setup_seed(int(np.random.SeedSequence((seed, samples, rank)).generate_state(1)[0]))


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators that training draws from, as `torch.load(weights_only=True)`
    accepts it."""
    legacy = np.random.get_state()
    assert isinstance(legacy, tuple)
    name, keys, *rest = legacy
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to a state from `rng_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
