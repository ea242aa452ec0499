"""Owns which weights of a model become int8: those of its language model's linear layers.

Embedding, norms, routers, projection and tower stay as they are: they are small, or read once for
an answer.
"""

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.feed_forward import FeedForward
from model.machine.int8 import Int8Linear
from model.model_vlm import MiniMindVLM


def quantize_int8(model: MiniMindVLM) -> None:
    """Give a model for inference, on a CPU and in float32, int8 weights in place.

    Layers that see the same inputs become one. The model cannot be saved or trained after this.
    """
    for module in [*model.model.modules()]:
        if isinstance(module, Attention):
            module.fused = _fuse(module, ("q_proj", "k_proj", "v_proj"))
            _replace(module, "o_proj")
        elif isinstance(module, FeedForward):
            module.fused = _fuse(module, ("gate_proj", "up_proj"))
            _replace(module, "down_proj")
    _replace(model, "lm_head")  # the embedding keeps its own


def _replace(module: nn.Module, name: str) -> None:
    setattr(module, name, Int8Linear(module.get_parameter(f"{name}.weight")))


def _fuse(module: nn.Module, names: tuple[str, ...]) -> Int8Linear:
    """One layer in place of several."""
    weights: list[Tensor] = [module.get_parameter(f"{name}.weight") for name in names]
    fused = Int8Linear(torch.cat(weights))
    for name in names:
        delattr(module, name)
    return fused
