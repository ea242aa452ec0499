"""Owns where the time and the arithmetic of a training step go."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from trainer.loop.loop_state import AnyEngine
from trainer.measuring.matrix_rate import wait_for

TOWER = "vision_encoder"
Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# PyTorch's fused attention on CPUs is not in its own table of operations.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class PhaseClock:
    """Seconds by phase: tower, rest of the forward pass, backward pass, optimizer.

    It waits for the device at the ends of each phase, so steps are slower than without it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wait_for(self.device)
        started_s = time.perf_counter()
        yield
        wait_for(self.device)
        self.seconds[name] += time.perf_counter() - started_s

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def watching(self, engine: AnyEngine) -> Iterator[None]:
        """A block in which an engine's steps are timed."""
        model: nn.Module = engine.module
        tower = getattr(model, TOWER, None)
        watched: list[tuple[Any, str, str]] = [
            (model, "forward", "forward"),
            (engine, "backward", "backward"),
            (engine, "step", "optimizer"),
            *([(tower, "forward", "tower")] if tower is not None else []),
        ]
        for owner, method, name in watched:
            setattr(owner, method, self.timed(name, getattr(owner, method)))
        try:
            yield
        finally:
            for owner, method, _ in watched:
                delattr(owner, method)  # what the class has comes to light again

    def shares(self, total_s: float, *, wait_s: float) -> dict[str, float]:
        """Share of each phase in the time of the steps; `forward` is without the tower."""
        seconds = dict(self.seconds) | {"data wait": wait_s}
        seconds["forward"] -= seconds.get("tower", 0.0)
        seconds["other"] = total_s - sum(seconds.values())
        return {name: value / total_s for name, value in seconds.items()}


def count_flop(step: Callable[[], object], *, num_steps: int = 1) -> dict[str, float]:
    """Floating-point operations of a step's matrix products, convolutions and attention, the mean
    over some steps: `total`, and the `tower`'s of these; a multiply-add counts as two."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        for _ in range(num_steps):
            step()
    by_module = counter.get_flop_counts()
    tower = sum(
        sum(counts.values()) for name, counts in by_module.items() if name.endswith(f".{TOWER}")
    )
    return {"total": counter.get_total_flops() / num_steps, "tower": tower / num_steps}
