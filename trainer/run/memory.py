"""Owns the estimate of a training step's memory: the step is taken on tensors without values.

Shapes: B batch, T tokens, P image tokens, V width of the tower, S image side in pixels.
"""

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.image_fusion import fuse_images
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.weights.strict_loading import VISION_PREFIX
from trainer.loop.engine import autocast, light_modules
from trainer.loop.optimizers import make_optimizer


@dataclass(frozen=True)
class StepShape:
    """A micro-step: samples of one picture and an answer.

    Args:
        num_tokens: of each sample. num_supervised: of each sample.
        image_side: S; None where the pictures' features are kept.
    """

    batch_size: int
    num_tokens: int
    num_supervised: int
    image_side: int | None


@dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment of a step, by what holds them.

    Args:
        activations: what the forward pass leaves for the backward pass, and working memory.
    """

    tower: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.tower + self.weights + self.gradients + self.optimizer + self.activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that live, and of the gradients among them.

    peak, gradients_at_peak: the greatest number, and the gradients at that moment.
    peak_rest: the greatest number without the gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.peak_rest = self.gradients = self.gradients_at_peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_grouped = func is torch.ops.aten._grouped_mm.default
        call = _grouped_product if is_grouped else func
        result = call(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def know(self, tensors: Any) -> None:
        """Leave tensors out that were there before."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = None

    def count_gradient(self, parameter: Tensor) -> None:
        """Hook of a parameter whose gradient is complete."""
        assert parameter.grad is not None
        self.gradients += _size(parameter.grad)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = None
        size = storage.nbytes()
        weakref.finalize(storage, self._drop, size)
        self.live += size
        self.peak_rest = max(self.peak_rest, self.live - self.gradients)
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients

    def _drop(self, size: int) -> None:
        self.live -= size


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor, *_: Any) -> Tensor:
    """A `grouped_mm` without values: PyTorch's own shape function knows bfloat16 alone."""
    is_weight_gradient = left.ndim == right.ndim == 2
    groups = (len(offs),) if is_weight_gradient else ()
    return left.new_empty(*groups, left.shape[-2], right.shape[-1])


def estimate_step(
    model: MiniMindForCausalLM,
    shape: StepShape,
    *,
    device: torch.device,
    dtype: str,
    optimizer: str = "adamw",
    keeps_gradients: bool = False,
) -> Memory:
    """The memory of a step of a model that is set up for training, with its tower if it has one.

    Every operation of the step runs on fake tensors, which have shapes and no values: it takes some
    seconds, and is within 15% of what a real step of that shape takes. What the device's driver and
    libraries take, and the gaps between tensors, come on top.

    Args:
        optimizer: as `make_optimizer` takes it.
        keeps_gradients: they are there during the forward pass: with several micro-steps or ranks.
    """
    with FakeTensorMode():
        twin = _without_values(model, device, dtype)
        own = {name: _size(tensor) for name, tensor in _tensors(twin)}
        tower = sum(size for name, size in own.items() if name.startswith(VISION_PREFIX))
        live = LiveBytes()
        live.know(tensor for _, tensor in _tensors(twin))
        _run_passes(twin, shape, live, device=device, dtype=dtype)
        gradients = live.gradients if keeps_gradients else live.gradients_at_peak
        activations = live.peak_rest if keeps_gradients else live.peak - gradients
        states, working = _run_optimizer(twin, live, kind=optimizer)
        if working > gradients + activations:
            gradients, activations = live.gradients, working - live.gradients
    return Memory(tower, sum(own.values()) - tower, gradients, states, activations)


def _run_passes(
    model: MiniMindForCausalLM,
    shape: StepShape,
    live: LiveBytes,
    *,
    device: torch.device,
    dtype: str,
) -> None:
    """The forward and backward pass of a micro-step, as training runs them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(live.count_gradient)
    with live, autocast(device, dtype):
        ids = torch.zeros(shape.batch_size, shape.num_tokens, dtype=torch.long, device=device)
        targets = ids.new_zeros(shape.batch_size * shape.num_supervised)
        embeds = model.model.embed_tokens(ids)
        if isinstance(model, MiniMindVLM):
            embeds = fuse_images(embeds, ids == 0, _see(model, shape, device))
        result = model(
            inputs_embeds=embeds, labels=ids, is_right_padded=True, target_positions=targets
        )
        loss = result.loss if result.aux_loss is None else result.loss + result.aux_loss
        del result, embeds
        loss.backward()


def _see(model: MiniMindVLM, shape: StepShape, device: torch.device) -> Tensor:
    """Projected features, (B, P, D), of one picture a sample."""
    if shape.image_side is not None:
        side = shape.image_side
        return model.encode_images(torch.zeros(shape.batch_size, 3, side, side, device=device))
    num_patches = model.config.num_image_tokens * model.config.token_merge**2
    kept = torch.zeros(
        shape.batch_size, num_patches, model.config.vision_hidden_size, device=device
    )
    return model.encode_images(None, vision_features=kept)


def _run_optimizer(model: nn.Module, live: LiveBytes, *, kind: str) -> tuple[int, int]:
    """Bytes of the optimizer's states, and the most that its step holds beside them."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, lr=1e-3, kind=kind)
    live.peak = live.live
    with live:
        optimizer.step()
    states = sum(
        _size(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return states, live.peak - states


def _without_values(
    model: MiniMindForCausalLM, device: torch.device, dtype: str
) -> MiniMindForCausalLM:
    """A copy whose tensors have no values, its tower as training has it; in a `FakeTensorMode`."""
    light = {id(p) for module in light_modules(model) for p in module.parameters()}
    # The steps of 8-bit pixels are a small table of numbers; the estimate begins behind them.
    memo: dict[int, Any] = {id(getattr(model, "pixel_steps", None)): None}
    for tensor in (*model.parameters(), *model.buffers()):
        kind = getattr(torch, dtype) if id(tensor) in light else tensor.dtype
        blank = torch.empty(tensor.shape, dtype=kind, device=device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if is_parameter else blank
    return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
