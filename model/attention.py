"""Owns attention, with rotary positions (RoPE, YaRN) and RMSNorm: a layer before its MLP.

Shapes: B batch, T tokens, N selected positions, D hidden, H query heads, K head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from model.generations import GENERATIONS
from model.packing import Packing

SHORT = 512  # tokens


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


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, rms in float32. Source: Zhang and Sennrich, "RMSNorm" (2019).

    The generation decides whether the weight is multiplied in float32 or after the cast back.
    """

    def __init__(self, dim: int, config: PreTrainedConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.scales_in_float32 = GENERATIONS[config.generation].scales_in_float32
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.scales_in_float32:
            return (self.weight * wide).to(hidden.dtype)
        return self.weight * wide.to(hidden.dtype)


def select_positions(states: Tensor, positions: Tensor | None) -> Tensor:
    """(B, T, D) to (N, D): the rows at positions (N,) of the flattened (B, T); None selects all."""
    return states if positions is None else states.flatten(0, 1).index_select(0, positions)


def attend_in_full(
    query: Tensor,  # (B, H, T, K)
    key: Tensor,  # (B, G, T, K): G heads, each for H / G of the query's
    value: Tensor,
    *,
    scaling: float,
    dropout: float,
) -> Tensor:  # (B, T, H, K)
    """Causal attention by whole (T, T) matrices of scores.

    PyTorch's fused kernel has no fast backward pass in bfloat16 on a CPU, and none with dropout:
    up to `SHORT` tokens this takes between a fifth and two thirds of its time (BENCHMARKS.md).
    """
    batch, num_heads, num_tokens, width = query.shape
    rows = (query * scaling).reshape(batch, key.shape[1], -1, width)  # (B, G, H / G * T, K)
    scores = (rows @ key.mT).view(batch, num_heads, num_tokens, num_tokens)
    later = torch.full((num_tokens, num_tokens), -torch.inf, dtype=scores.dtype).triu(1)
    weights = F.dropout((scores + later).softmax(-1), dropout)
    mixed = weights.view(*rows.shape[:3], num_tokens) @ value
    return mixed.view(batch, num_heads, num_tokens, -1).transpose(1, 2)


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE; in generation 3 with norms of queries and keys.

    Source: Ainslie et al., "GQA" (2023); Henry et al., "Query-Key Normalization" (2020).
    """

    is_causal = True

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)
        self.fused: nn.Module | None = None  # in place of the first three (`model.quantizing`)
        self.widths = (q_dim, kv_dim, kv_dim)
        has_qk_norm = GENERATIONS[config.generation].has_qk_norm
        self.q_norm = RMSNorm(config.head_dim, config) if has_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config) if has_qk_norm else nn.Identity()

    def queries_and_keys(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries (B, H, T, K) and keys of this call's tokens."""
        query, key, _ = self._projected(hidden)
        return self._rotated(query, key, rope)

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, T, H * K), keys and values, or the three in one tensor, in this order."""
        if self.fused is not None:
            return (self.fused(hidden),)
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)

    def _projected(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Heads of queries (B, H, T, K), keys and values."""
        states = self.project(hidden)
        if len(states) == 1:
            states = states[0].split(self.widths, -1)
        return tuple(map(self._heads, states))

    def _rotated(
        self, query: Tensor, key: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        query, key = self.q_norm(query), self.k_norm(key)
        return apply_rope(query, *rope).to(key.dtype), apply_rope(key, *rope).to(key.dtype)

    def _is_faster_in_full(self, query: Tensor) -> bool:
        """Whether this is training, on a CPU in bfloat16, of a short text."""
        is_ours_to_choose = self.config._attn_implementation == "sdpa"
        is_slow_there = self.training and query.is_cpu and query.dtype == torch.bfloat16
        return is_ours_to_choose and is_slow_there and query.shape[2] <= SHORT

    def _heads(self, projected: Tensor) -> Tensor:  # (B, T, H * K) -> (B, H, T, K)
        return projected.view(*projected.shape[:2], -1, self.head_dim).transpose(1, 2)

    def forward(
        self,
        hidden: Tensor,  # (B, T, D)
        rope: tuple[Tensor, Tensor],  # 2 x (B, T, K/2)
        attention_mask: Tensor | None,
        cache: Cache | None,
        output_positions: Tensor | None = None,  # (N,) into the flattened (B, T); None: all
        packing: Packing | None = None,  # hidden is a row of packed samples
    ) -> Tensor:  # (B, T, D), or (N, D)
        query, key, value = self._projected(hidden)
        query, key = self._rotated(query, key, rope)
        query, key = query.to(value.dtype), key.to(value.dtype)
        if packing is not None:
            query, key, value = (
                self._heads(packing.unpack(states.transpose(1, 2).flatten(2)))
                for states in (query, key, value)
            )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        dropout = self.config.dropout if self.training else 0.0
        if cache is None and attention_mask is None and self._is_faster_in_full(query):
            mixed = attend_in_full(query, key, value, scaling=self.scaling, dropout=dropout)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            mixed, _ = attend(
                self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout
            )
        mixed = mixed.flatten(2)  # (B, T, H * K)
        if packing is not None:
            mixed = packing.pack(mixed)
        mixed = self.o_proj(select_positions(mixed, output_positions))
        return F.dropout(mixed, self.config.dropout, self.training)
