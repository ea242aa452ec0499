"""Owns the learning-rate schedule."""

import math


def get_lr(current_step: float, total_steps: float, lr: float) -> float:
    """Cosine from 1.1 lr (not lr: the floor of lr / 10 is added throughout) down to lr / 10.

    Args:
        current_step, total_steps: progress of the run in any unit; the loop counts samples
            consumed once the step is done, so the first step already stands at 1, not 0.
    """
    return lr / 10 + lr / 2 * (1 + math.cos(math.pi * current_step / total_steps))
