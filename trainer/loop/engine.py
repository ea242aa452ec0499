"""Owns what turns losses into an update of the weights: AdamW, in one process or under DDP.

`trainer/zero.py` has the same face on DeepSpeed; the loop knows neither.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.machine.device import (
    heeds_found_inf,
)
from model.weights.strict_loading import VISION_PREFIX


class Engine:
    """Every process holds all weights and moments; DDP averages the gradients of several ranks.

    Args:
        model: the model, wrapped for several ranks.
        grad_clip: largest gradient norm; 0 does not clip.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        grad_clip: float,
    ):
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self._grad_clip = grad_clip or float("inf")

    def micro_step(self, *, is_last: bool) -> contextlib.AbstractContextManager:
        """What a forward and backward pass runs in; only the last of a step shares gradients."""
        is_alone = not hasattr(self.model, "no_sync")
        return contextlib.nullcontext() if is_last or is_alone else self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient; over several ranks its mean counts."""
        self.scaler.scale(loss).backward()

    def step(self, sums: Tensor, *, is_empty: bool) -> tuple[Tensor, Tensor]:
        """Clip and apply the gradient, and forget it.

        Args:
            sums: what must be finite beside the gradient for the step to count.
            is_empty: nothing was supervised, so the weights stay (no decay either).
        Returns:
            The gradient's norm before clipping, and whether the step was left out because
            something was not finite; both stay on the device (but see `heeds_found_inf`).
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, self._grad_clip)
        is_bad = ~(torch.isfinite(grad_norm) & torch.isfinite(sums).all())
        if not is_empty:
            self.optimizer.found_inf = is_bad.float()  # read by the fused kernel, on the device
            if heeds_found_inf(sums.device) or not is_bad:
                self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, is_bad

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model to measure with meanwhile; ranks need not keep step with one another."""
        model = getattr(self.model, "module", self.model)
        model.eval()
        yield model
        model.train()

    def tensors(self) -> tuple[dict, dict]:
        """State dicts of model (without the tower) and optimizer; every rank must ask."""
        model = getattr(self.model, "module", self.model)
        return trained_state(model), self.optimizer.state_dict()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's tensors but the vision tower's, in full precision."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith(VISION_PREFIX)}


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Mixed precision for the forward pass; float32 means none."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
