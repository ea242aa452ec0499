"""Owns a prompt's way through the model in pieces: between two of them other answers go on.

Shapes: T tokens, I images, P image tokens, D hidden, V vocabulary, L layers, G heads of keys,
K head dim.
"""

from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from model.generation.shelves import states_of
from model.image_fusion import fuse_images
from model.model_vlm import MiniMindVLM

PIECE = 512  # tokens that are computed at once


class Filled(NamedTuple):
    """What the model made of a prompt: the next token's logits, and keys and values."""

    logits: Tensor  # (1, V) float32
    states: Tensor  # (L, 2, G, T, K)


def prefill(model: MiniMindVLM, inputs: dict[str, Tensor]) -> Generator[None, None, Filled]:
    """Compute a prompt: image by image, then `PIECE` tokens at a time.

    Args:
        inputs: of `VLMProcessor.prompt_batch` or `text_batch`, one prompt.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    embeds: Tensor = model.model.embed_tokens(inputs["input_ids"])
    images = yield from _encode(model, inputs)
    if images is not None:
        embeds = fuse_images(embeds, inputs["image_mask"], images)
    cache: Cache | None = None
    pieces = embeds.split(PIECE, 1)
    for number, piece in enumerate(pieces):
        output = model(inputs_embeds=piece, cache=cache, use_cache=True, logits_to_keep=1)
        cache = output.cache
        if number < len(pieces) - 1:
            yield
    assert cache is not None
    return Filled(output.logits[:, -1].float(), states_of(cache))


def _encode(
    model: MiniMindVLM, inputs: dict[str, Tensor]
) -> Generator[None, None, Tensor | None]:
    """The prompt's images (I, P, D); None where it has none."""
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
