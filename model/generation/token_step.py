"""Owns the forward pass of one more token a row: what decoding does over and over.

It computes what `MiniMindModel.forward` does, without what only prompts, training or padding need:
no masks of rows of one length, no repeated keys, rotation tables once for all tokens.

Shapes: B rows, D hidden, H query heads, G heads of keys, K head dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Attention, RMSNorm, rope_tables
from model.generation.key_values import KeyValues
from model.model_vlm import MiniMindVLM

FIRST_POSITIONS = 1024  # of the rotation tables


class TokenStep:
    """The model's next logits after one more token; safe to share between threads."""

    def __init__(self, model: MiniMindVLM):
        self._model, self._config = model, model.config
        self._rope: tuple[Tensor, Tensor] | None = None

    def __call__(self, tokens: Tensor, past: KeyValues) -> Tensor:
        """Logits (B, V) after tokens (B,), which join the past. They are text: none is taken for an
        image placeholder."""
        decoder = self._model.model
        past.open_slot()
        hidden = decoder.embed_tokens(tokens)[:, None]  # (B, 1, D)
        rope = self._rotations(past, like=hidden)
        for index, layer in enumerate(decoder.layers):
            normed = _norm(layer.input_layernorm, hidden)
            hidden = hidden + _attend(layer.self_attn, normed, rope, past, index)
            hidden = hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden), None)[0]
        logits: Tensor = self._model.lm_head(_norm(decoder.norm, hidden))
        return logits[:, -1]

    def _rotations(self, past: KeyValues, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """What heads (B, H, K) and their swapped halves are multiplied by: (B, 1, K) each."""
        rope = self._rope
        if rope is None or len(rope[0]) < past.num_slots or rope[0].dtype != like.dtype:
            num_positions = max(FIRST_POSITIONS, 2 * past.num_slots)
            positions = torch.arange(num_positions, device=like.device)
            cos, sin = (table.to(like.dtype) for table in rope_tables(self._config, positions))
            rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
            self._rope = rope
        return rope[0][past.positions][:, None], rope[1][past.positions][:, None]


def _norm(norm: RMSNorm, hidden: Tensor) -> Tensor:
    """The same in fewer steps, where the number format leaves nothing to choose."""
    if hidden.dtype != torch.float32:
        return norm(hidden)  # type: ignore[no-any-return]
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.eps)


def _attend(
    attention: Attention,
    hidden: Tensor,  # (B, 1, D)
    rope: tuple[Tensor, Tensor],  # 2 x (B, 1, K)
    past: KeyValues,
    layer: int,
) -> Tensor:  # (B, 1, D)
    """Each row's newest token attends to its own text.

    The query heads of a group take the places of tokens, so that their keys are not repeated.
    """
    width = attention.head_dim
    query, key, value = (t.unflatten(-1, (-1, width))[:, 0] for t in attention.project(hidden))
    query, key = attention.q_norm(query), attention.k_norm(key)
    heads = torch.cat((query, key), 1)  # (B, H + G, K)
    heads = (heads * rope[0] + heads.roll(width // 2, -1) * rope[1]).to(value.dtype)
    query, key = heads.split((query.shape[1], key.shape[1]), 1)
    keys, values = past.append(layer, key, value)
    mixed = F.scaled_dot_product_attention(
        query.unflatten(1, (-1, attention.num_key_value_groups)),  # (B, G, H / G, K)
        keys,
        values,
        attn_mask=past.mask,
        scale=attention.scaling,
    )
    out: Tensor = attention.o_proj(mixed.flatten(1)[:, None])
    return out
