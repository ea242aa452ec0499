"""Owns the way of prompts through the model in pieces: between two of them other answers go on.

Shapes: B prompts, T tokens, I images, P image tokens, D hidden, V vocabulary, L layers, G heads of
keys, K head dim.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.generation.prefixes import Prefix
from model.generation.shelves import states_of
from model.image_fusion import fuse_images
from model.model_vlm import MiniMindVLM

PIECE = 512  # tokens that are computed at once
LAST: dict[str, Any] = {"logits_to_keep": 1}


class Filled(NamedTuple):
    """What the model made of a prompt: the next token's logits, and keys and values."""

    logits: Tensor  # (1, V) float32
    states: Tensor  # (L, 2, G, T, K)


def go_together(lengths: Sequence[int]) -> bool:
    """Whether prompts of so many tokens are computed at once: short ones, so that weights are read
    for all of them together."""
    return len(lengths) * max(lengths) <= PIECE


def prefill(
    model: MiniMindVLM, prompts: Sequence[dict[str, Tensor]], prefix: Prefix | None = None
) -> Generator[None, None, list[Filled]]:
    """Compute prompts: image by image, then `PIECE` tokens at a time.

    Args:
        prompts: each of `VLMProcessor.prompt_batch` or `text_batch`; several if they
            `go_together`.
        prefix: the beginning of the one prompt, which was computed before.
    """
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    joined = prompts[0] if len(prompts) == 1 else _join(prompts, max(lengths))
    inputs = {name: tensor.to(model.device) for name, tensor in joined.items()}
    if prefix is not None:
        for name in ("input_ids", "attention_mask", "image_mask"):
            inputs[name] = inputs[name][:, prefix.length :]
        inputs["pixel_values"] = inputs["pixel_values"][prefix.num_images :]
    embeds: Tensor = model.model.embed_tokens(inputs["input_ids"])
    images = yield from _encode(model, inputs)
    if images is not None:
        embeds = fuse_images(embeds, inputs["image_mask"], images)
    is_even = min(lengths) == max(lengths)
    mask = None if is_even else inputs["attention_mask"]  # without one the fast kernel runs
    cache = None if prefix is None else prefix.cache()
    pieces = embeds.split(PIECE, 1)
    for number, piece in enumerate(pieces):
        output = model(None, mask, inputs_embeds=piece, cache=cache, use_cache=True, **LAST)
        cache = output.cache
        if number < len(pieces) - 1:
            yield
    assert cache is not None
    logits = output.logits[:, -1:].float().unbind(0)
    return [
        Filled(own, states_of(cache, row, length))
        for row, (own, length) in enumerate(zip(logits, lengths, strict=True))
    ]


def _join(prompts: Sequence[dict[str, Tensor]], width: int) -> dict[str, Tensor]:
    """Prompts without features as one batch, padded on the left."""
    images = torch.cat([prompt["pixel_values"] for prompt in prompts])
    padded = {
        name: torch.cat(
            [F.pad(own, (width - own.shape[1], 0)) for own in (p[name] for p in prompts)]
        )
        for name in ("input_ids", "attention_mask", "image_mask")
    }
    return padded | {"pixel_values": images}


def _encode(model: MiniMindVLM, inputs: dict[str, Tensor]) -> Generator[None, None, Tensor | None]:
    """The prompts' images (I, P, D), in reading order; None where they have none."""
    pixels, features = inputs.get("pixel_values"), inputs.get("vision_features")
    if features is not None:
        return model.encode_images(
            pixels, vision_features=features, has_features=inputs["has_features"]
        )
    if pixels is None or not len(pixels):
        return None
    encoded = []
    for image in pixels.split(1):
        encoded.append(model.encode_images(image))
        yield
    return torch.cat(encoded)
