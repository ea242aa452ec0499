"""Owns keys and values of prompts that later ones may begin with: a chat's earlier turns, its
pictures, its system message.

A token's keys and values depend on the tokens and images in front of it alone, so those of the part
that two prompts share, token by token and pixel by pixel, serve both.

Shapes: T tokens, I images, P image tokens, L layers, G heads of keys, K head dim.
"""

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

LEAST = 64  # tokens of what is worth keeping
KEPT = 8192  # tokens of all that is kept


class Prefix(NamedTuple):
    """What a prompt shares with one before it: `length` tokens, `num_images` whole images."""

    length: int
    num_images: int
    states: Tensor  # (L, 2, G, length, K)

    def cache(self) -> Cache:
        """A copy that a forward pass may go on from."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.states):
            cache.update(keys[None].clone(), values[None].clone(), layer)
        return cache


def contents_of(inputs: dict[str, Tensor], *, num_image_tokens: int) -> Tensor | None:
    """What tells a prompt's tokens apart (T,): ids, and in an image's places the digest of its
    pixels, over and over. None for a prompt that is not worth keeping.

    Args:
        inputs: of `VLMProcessor.prompt_batch` or `text_batch`, one prompt.
        num_image_tokens: P.
    """
    ids = inputs["input_ids"][0]
    if not LEAST <= len(ids) <= KEPT or "vision_features" in inputs:
        return None
    contents = ids.clone()
    places = inputs["image_mask"][0].nonzero()[:, 0]
    for number, pixels in enumerate(inputs["pixel_values"]):
        digest = hashlib.sha256(pixels.contiguous().numpy().tobytes()).digest()
        numbers = torch.frombuffer(bytearray(digest), dtype=torch.int64)  # 4
        own = places[number * num_image_tokens :][:num_image_tokens]
        contents[own] = numbers.repeat(num_image_tokens)[:num_image_tokens]
    return contents


class Prefixes:
    """The prompts that were used last, up to `KEPT` tokens together; of one thread."""

    def __init__(self, *, num_image_tokens: int):
        self._num_image_tokens = num_image_tokens
        self._kept: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()  # contents, states
        self._num_put = 0

    def find(self, contents: Tensor, image_mask: Tensor) -> Prefix | None:
        """The longest part that the prompt shares with one that is kept; its last token is none.

        Args:
            contents: (T,). image_mask: (T,) bool.
        """
        lengths = {key: _shared(contents[:-1], own) for key, (own, _) in self._kept.items()}
        key = max(lengths, key=lengths.__getitem__, default=None)
        if key is None:
            return None
        length = lengths[key]
        num_tokens = int(image_mask[:length].sum())
        length -= num_tokens % self._num_image_tokens  # a part of an image is none
        if length < LEAST:
            return None
        self._kept.move_to_end(key)
        num_images = num_tokens // self._num_image_tokens
        return Prefix(length, num_images, self._kept[key][1][:, :, :, :length])

    def keep(self, contents: Tensor, states: Tensor) -> None:
        """Keep a prompt, in place of those that it begins with.

        Args:
            states: (L, 2, G, T, K).
        """
        for key, (own, _) in list(self._kept.items()):
            if _shared(own, contents) == len(own):
                del self._kept[key]
        self._num_put += 1
        self._kept[self._num_put] = contents, states
        while sum(len(own) for own, _ in self._kept.values()) > KEPT:
            self._kept.popitem(last=False)


def _shared(first: Tensor, second: Tensor) -> int:
    """How many numbers two sequences begin with in common."""
    size = min(len(first), len(second))
    differs = (first[:size] != second[:size]).nonzero()
    return int(differs[0]) if len(differs) else size
