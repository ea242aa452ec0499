"""Owns the learning-rate schedule."""

import math


def get_lr(current_step: float, total_steps: float, lr: float, *, peak: float = 1.1) -> float:
    """Cosine from `peak * lr` down to lr / 10.

    Args:
        current_step, total_steps: progress of the run in any unit; the loop counts samples
            consumed once the step is done, so the first step already stands at 1, not 0.
        peak: 1.1 in generation 2, whose floor of lr / 10 is added throughout; 1 in generation 3.
    """
    height = (peak - 0.1) / 2 * lr
    return lr / 10 + height * (1 + math.cos(math.pi * current_step / total_steps))
