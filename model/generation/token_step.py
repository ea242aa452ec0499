"""Owns the forward pass of one more token a row: what decoding does over and over.

It computes what `MiniMindModel.forward` does, without what only prompts, training or padding need:
no masks of rows of one length, no repeated keys, rotation tables once for all tokens.

Shapes: B rows, D hidden, H query heads, G heads of keys, K head dim, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.attention import Attention, RMSNorm, rope_tables
from model.feed_forward import FeedForward, MoEFeedForward
from model.generation.shelves import Past
from model.machine.compiling import compiled
from model.machine.int8 import Int8Linear
from model.model_minimind import DecoderLayer
from model.model_vlm import MiniMindVLM

FIRST_POSITIONS = 1024  # of the rotation tables


class TokenStep:
    """The model's next logits after one more token; safe to share between threads.

    Args:
        compile: compile what lies between one layer's attention and the next's, at the first token
            of one row and at the first of several.
    """

    def __init__(self, model: MiniMindVLM, *, compile: bool = False):
        self._config = model.config
        self._embed, self._lm_head = model.model.embed_tokens, model.lm_head
        self._layers = [_Layer(layer) for layer in model.model.layers]
        self._norm = _Norm(model.model.norm)
        if compile:
            for layer in self._layers:
                layer.into_attention = compiled(layer.into_attention)  # type: ignore[method-assign]
                layer.behind_attention = compiled(layer.behind_attention)  # type: ignore[method-assign]
        self._rope: tuple[Tensor, Tensor] | None = None

    def __call__(self, tokens: Tensor, past: Past) -> Tensor:
        """Logits (B, V) after tokens (B,), which join the past. They are text: none is taken for an
        image placeholder."""
        past.open_slot()
        hidden = self._embed(tokens)[:, None]  # (B, 1, D)
        rope = self._rotations(past, like=hidden)
        for index, layer in enumerate(self._layers):
            query, pair = layer.into_attention(hidden, rope)
            mixed = past.attend(index, query, pair, scaling=layer.scaling)
            hidden = layer.behind_attention(hidden, mixed)
        logits: Tensor = self._lm_head(self._norm(hidden))
        return logits[:, -1]

    def _rotations(self, past: Past, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """What heads (B, H, K) and their swapped halves are multiplied by: (B, 1, K) each."""
        rope = self._rope
        if rope is None or len(rope[0]) < past.num_slots or rope[0].dtype != like.dtype:
            num_positions = max(FIRST_POSITIONS, 2 * past.num_slots)
            positions = torch.arange(num_positions, device=like.device)
            cos, sin = (table.to(like.dtype) for table in rope_tables(self._config, positions))
            rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
            self._rope = rope
        return rope[0][past.positions][:, None], rope[1][past.positions][:, None]


class _Norm:
    """An `RMSNorm` of (B, 1, D), in fewer steps where the number format leaves no choice."""

    def __init__(self, norm: RMSNorm):
        self._norm, self._weight = norm, norm.weight
        self._eps = norm.weight.new_full((1, 1, 1), norm.eps)
        self._share = 1 / len(norm.weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.dtype != torch.float32:
            return self._norm(hidden)  # type: ignore[no-any-return]
        mean = torch.baddbmm(self._eps, hidden, hidden.mT, alpha=self._share)  # of the squares
        return hidden * mean.rsqrt_() * self._weight


class _Layer:
    """A decoder layer's parts, at hand: finding them in modules takes as long as small products."""

    def __init__(self, layer: DecoderLayer):
        attention = layer.self_attn
        self._before_attention = _Norm(layer.input_layernorm)
        self._before_mlp = _Norm(layer.post_attention_layernorm)
        self._project, self._out = _projection_of(attention), _call_of(attention.o_proj)
        self._norms = (attention.q_norm, attention.k_norm)
        self._width, self.scaling = attention.head_dim, attention.scaling
        self._per_group = attention.num_key_value_groups
        self._mix = _mix_of(layer.mlp)

    def into_attention(
        self,
        hidden: Tensor,  # (B, 1, D)
        rope: tuple[Tensor, Tensor],  # 2 x (B, 1, K)
    ) -> tuple[Tensor, Tensor]:  # (B, G, H / G, K), (B, 2, G, K)
        """Each row's queries, and its keys and values in one."""
        heads = self._project(self._before_attention(hidden))
        heads = heads.view(len(hidden), -1, self._width)  # (B, H + 2 G, K)
        num_groups = heads.shape[1] // (self._per_group + 2)
        turned = heads.narrow(1, 0, heads.shape[1] - num_groups)  # all but the values
        query, pair = heads.split_with_sizes((num_groups * self._per_group, 2 * num_groups), 1)
        if isinstance(self._norms[0], RMSNorm):
            query.copy_(self._norms[0](query))
            pair[:, :num_groups] = self._norms[1](pair[:, :num_groups])
        swapped = turned.roll(self._width // 2, -1)
        turned.mul_(rope[0]).addcmul_(swapped, rope[1])
        return query.unflatten(1, (num_groups, self._per_group)), pair.unflatten(1, (2, num_groups))

    def behind_attention(self, hidden: Tensor, mixed: Tensor) -> Tensor:  # (B, 1, D)
        """The layer's output, from its input and what each head has gathered."""
        hidden = hidden + self._out(mixed.reshape(len(hidden), 1, -1))
        return hidden + self._mix(self._before_mlp(hidden))


def _projection_of(attention: Attention) -> Callable[[Tensor], Tensor]:
    """Queries, keys and values of (B, 1, D) in one tensor."""
    if attention.fused is not None:
        return _call_of(attention.fused)
    return lambda hidden: torch.cat(attention.project(hidden), -1)


def _mix_of(mlp: FeedForward | MoEFeedForward) -> Callable[[Tensor], Tensor]:
    """What a layer computes behind attention, without what is for training."""
    if isinstance(mlp, MoEFeedForward):
        return lambda hidden: mlp(hidden, None)[0]
    if mlp.fused is None:
        return mlp.mix
    fused, act, down = _call_of(mlp.fused), mlp.act, _call_of(mlp.down_proj)

    def mix(hidden: Tensor) -> Tensor:
        gate, up = fused(hidden).chunk(2, -1)
        return down(act(gate) * up)

    return mix


def _call_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Int8 layers have no hooks, and are called past what calls these."""
    return module.forward if isinstance(module, Int8Linear) else module
