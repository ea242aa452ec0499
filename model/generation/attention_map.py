"""Owns the attention maps of an answer: how much its tokens attend to each image patch.

The weights are computed again here, layer by layer: the model's own attention is fused and never
holds them.

Shapes: T tokens, A answer tokens, H heads, K head dim, I images, P image tokens, D hidden.
"""

import math

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from model.attention import rope_tables
from model.image_fusion import fuse_images
from model.model_minimind import DecoderLayer
from model.model_vlm import MiniMindVLM
from model.vision_tower import count_prefix_tokens


def image_attention(
    model: MiniMindVLM, batch: dict[str, Tensor], answer_ids: Tensor, *, layer: int | None
) -> list[Tensor]:
    """Mean attention of the answer's tokens to each image's patches.

    Args:
        batch: one prompt of `VLMProcessor.prompt_batch`.
        answer_ids: (1, A) int64.
        layer: from 0; None is the mean over all layers.
    Returns:
        One (side, side) float32 map for each image, on the CPU; with `token_merge` m a cell stands
        for m x m patches.
    """
    if not len(batch["pixel_values"]):
        return []
    num_prompt = batch["input_ids"].shape[1]
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    embeds = fuse_images(
        model.model.embed_tokens(inputs["input_ids"]),
        inputs["image_mask"],
        model.encode_images(inputs["pixel_values"]),
    )
    answer_embeds = model.model.embed_tokens(answer_ids.to(model.device))
    embeds = torch.cat([embeds, answer_embeds], dim=1)
    attention = _mean_attention(model, embeds, num_prompt, layer=layer)  # (T,)
    patches = attention[:num_prompt][batch["image_mask"][0]]
    patches = patches.view(-1, model.config.num_image_tokens)  # (I, P)
    if model.config.keep_cls:  # CLS token and registers have no place in the picture
        assert model.vision_encoder is not None
        patches = patches[:, count_prefix_tokens(model.vision_encoder.config) :]
    side = math.isqrt(patches.shape[1])
    return list(patches.view(-1, side, side))


def _mean_attention(model: MiniMindVLM, embeds: Tensor, first: int, *, layer: int | None) -> Tensor:
    """Attention of the tokens from `first` on, the mean over layers, heads and them: (T,)."""
    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    cos, sin = rope_tables(model.config, positions)
    rope = cos.to(embeds.dtype), sin.to(embeds.dtype)
    causal_mask = create_causal_mask(
        config=model.config, inputs_embeds=embeds, attention_mask=None, cache=None
    )
    layers = model.model.layers if layer is None else model.model.layers[: layer + 1]
    hidden, weights = embeds, list[Tensor]()
    for i, block in enumerate(layers):
        if layer is None or i == layer:
            weights.append(_attention_of(block, hidden, rope, first))
        hidden, _ = block(
            hidden, rope=rope, attention_mask=causal_mask, cache=None, token_mask=None
        )
    return torch.stack(weights).mean(0).cpu()


def _attention_of(
    block: DecoderLayer, hidden: Tensor, rope: tuple[Tensor, Tensor], first: int
) -> Tensor:
    """The same of one layer: (T,), the mean over heads and the tokens from `first` on."""
    attention, normed = block.self_attn, block.input_layernorm(hidden)
    query, key = attention.queries_and_keys(normed, rope)  # (1, H, T, K) each
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    scores = (query[:, :, first:] @ key.mT).float() * attention.scaling  # (1, H, A, T)
    num_answer, num_tokens = scores.shape[-2:]
    is_future = torch.ones(num_answer, num_tokens, dtype=torch.bool, device=scores.device)
    is_future = is_future.triu(num_tokens - num_answer + 1)
    return nn.functional.softmax(scores.masked_fill(is_future, -torch.inf), -1).mean((0, 1, 2))
