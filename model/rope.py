"""Owns rotary position embeddings (RoPE), with YaRN for long prompts.

Shapes: B batch, T tokens, H heads, K head dim.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def rope_tables(config: PreTrainedConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles of each position.

    They are computed at every forward pass rather than registered as a buffer: a buffer would lose
    precision in `model.half()`, be broadcast by DDP and be uninitialised after the meta device.

    Args:
        config: a `MiniMindConfig`. position_ids: (B, T) integers.
    Returns:
        Two tensors (B, T, K/2), float32.
    Source: Su et al., "RoFormer" (2021); Peng et al., "YaRN" (2023).
    """
    device = position_ids.device
    if config.rope_parameters["rope_type"] == "default":
        exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
        inv_freq = 1.0 / config.rope_theta**exponent
    else:
        inv_freq_of = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
        inv_freq, _ = inv_freq_of(config, device)  # the attention factor is fixed at 1
    angles = position_ids[..., None].float() * inv_freq  # (B, T, K/2)
    return angles.cos(), angles.sin()


def apply_rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (B, H, T, K) by tables (B, T, K/2), in the half-split layout."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
