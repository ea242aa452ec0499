"""Owns what moves the weights: the learning-rate schedule, which parameters train, AdamW."""

import math
import re
from collections.abc import Iterable

import torch
from torch import nn

WEIGHT_DECAY = 0.01


def get_lr(current_step: float, total_steps: float, lr: float) -> float:
    """Cosine from 1.1 lr (not lr: the floor of lr / 10 is added throughout) down to lr / 10.

    Args:
        current_step, total_steps: progress of the run in any unit; the loop counts samples
            consumed once the step is done, so the first step already stands at 1, not 0.
    """
    return lr / 10 + lr / 2 * (1 + math.cos(math.pi * current_step / total_steps))


def set_trainable(model: nn.Module, *, freeze_llm: bool, trainable: str | None = None) -> list[str]:
    """Choose the parameters that train; the vision tower never does.

    Args:
        freeze_llm: the projection only, else language model and projection.
        trainable: a regular expression searched in the names, instead of that policy.
    Returns:
        The names that train.
    Raises:
        ValueError: nothing is left to train, or not a regular expression.
    """
    try:
        pattern = re.compile(trainable if trainable is not None else "")
    except re.error as error:
        raise ValueError(
            f"--trainable {trainable!r} is not a regular expression: {error}"
        ) from None
    names = []
    for name, parameter in model.named_parameters():
        if name.startswith("vision_encoder."):
            wanted = False
        elif trainable is not None:
            wanted = bool(pattern.search(name))
        else:
            wanted = not freeze_llm or name.startswith("vision_proj.")
        parameter.requires_grad_(wanted)
        if wanted:
            names.append(name)
    if not names:
        raise ValueError(
            f"--trainable {trainable!r} matches no parameter, such as model.norm.weight"
        )
    return names


def make_optimizer(parameters: Iterable[nn.Parameter], *, lr: float) -> torch.optim.AdamW:
    """AdamW with its default betas. The fused kernel can be told on the device, by `found_inf`,
    to leave a step out, so that no step waits for the host."""
    return torch.optim.AdamW(list(parameters), lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
