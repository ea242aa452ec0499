"""Owns the backward pass and the optimizer step, in one process or under DDP.

`zero_engine.py` has the same methods on DeepSpeed; the loop calls either.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.machine.device import heeds_found_inf
from model.weights.strict_loading import VISION_PREFIX
from trainer.ranks.group import Ranks


class Engine:
    """Every process holds all weights and moments; DDP averages the gradients over the ranks.

    Args:
        model: the model; with several ranks, wrapped in DistributedDataParallel.
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

    @property
    def module(self) -> nn.Module:
        """The model itself, without DDP."""
        module: nn.Module = getattr(self.model, "module", self.model)
        return module

    def micro_step(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Context of a forward and backward pass. DDP averages gradients in the last one of a step
        only (`no_sync` before)."""
        if is_last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = self.model.no_sync()
        return context

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss; DDP takes its mean over the ranks."""
        self.scaler.scale(loss).backward()

    def step(self, sums: Tensor, *, is_empty: bool) -> tuple[Tensor, Tensor]:
        """Clip the gradient, update the weights, and zero the gradient.

        Args:
            sums: losses; the step is left out if one of them, or the gradient, is not finite.
            is_empty: nothing was supervised, so the weights stay (no decay either).
        Returns:
            The gradient's norm before clipping, and whether the step was left out; both on the
            device, so that the host need not wait (but see `heeds_found_inf`).
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, self._grad_clip)
        is_bad = ~(torch.isfinite(grad_norm) & torch.isfinite(sums).all())
        if not is_empty:
            # An attribute that fused optimizers read, on the device.
            self.optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
            if heeds_found_inf(sums.device) or not is_bad:
                self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, is_bad

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model without DDP, in evaluation mode: ranks need not have equally many batches."""
        self.module.eval()
        yield self.module
        self.module.train()

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """State dicts of model (without the tower) and optimizer; every rank must call it."""
        return trained_state(self.module), self.optimizer.state_dict()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's tensors but the vision tower's, in full precision."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith(VISION_PREFIX)}


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[None]:
    """Mixed precision for the forward pass; float32 means none."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def lighten_tower(model: nn.Module, dtype: str) -> None:
    """Cast the weights of `light_modules` once, to the type that autocast would cast them to at
    every step. The rest stays in float32, so the results keep their bits.
    """
    for module in light_modules(model):
        module.to(getattr(torch, dtype))


def light_modules(model: nn.Module) -> list[nn.Module]:
    """The frozen tower's linear and convolution layers."""
    tower: Any = getattr(model, "vision_encoder", None)
    kept = None
    if hasattr(tower, "rope_embeddings"):  # DINOv3's positions take the type of this weight
        kept = tower.get_input_embeddings()
    modules = tower.modules() if tower is not None else ()
    return [m for m in modules if isinstance(m, nn.Linear | nn.Conv2d) and m is not kept]


def wrap_for_ranks(model: nn.Module, ranks: Ranks) -> nn.Module:
    """DDP over several ranks; the frozen tower is not broadcast."""
    if ranks.world_size == 1:
        return model
    named = [*model.named_parameters(), *model.named_buffers()]
    frozen = [n for n, _ in named if n.startswith(VISION_PREFIX)]
    model._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]
    wrapped = DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
    if ranks.device.type == "cpu":
        wrapped.register_comm_hook(None, average_each_gradient)
    return wrapped


def average_each_gradient(
    _state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Average the gradients of a bucket one by one.

    DDP cuts its buckets anew after its first step, and with three ranks or more the cut decides in
    which order numbers are summed: a resumed run would differ from an uninterrupted one by a bit.
    """
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in bucket.gradients()]:
        work.wait()
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer().div_(dist.get_world_size()))
    return future
