"""Owns the keys and values of a batch of texts that grow by a token at a time.

Shapes: L layers, B rows, T tokens of the longest prompt, G heads of keys, C slots, K head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

FIRST_SLOTS = 256  # taken beyond the prompts; what is full grows by half


class KeyValues:
    """Keys and values in room that is taken ahead: a token's are written, and none are copied.

    A row's tokens stand in its first slots, in order and without padding: where all rows are of one
    length, attention needs no mask.

    Args:
        prompts: of the forward pass over the prompts, padded on the left.
        lengths: of each row's prompt, without padding.
        max_new_tokens: of the longest answer, for which no room beyond is taken.
    """

    _lengths: Tensor  # (B,)
    _longest: int
    _is_even: bool

    def __init__(self, prompts: Cache, lengths: Sequence[int], *, max_new_tokens: int):
        layers: list[Any] = prompts.layers
        num_prompts, num_groups, num_slots, width = map(int, layers[0].keys.shape)
        repeats = len(lengths) // num_prompts
        self._most_slots = num_slots + max_new_tokens
        self._states = layers[0].keys.new_zeros(
            len(layers),
            len(lengths),
            2,
            num_groups,
            min(num_slots + FIRST_SLOTS, self._most_slots),
            width,
        )  # (L, B, 2, G, C, K)
        for row, length in enumerate(lengths[::repeats]):
            rows = slice(row * repeats, (row + 1) * repeats)
            for layer, own in zip(layers, self._states, strict=True):
                for part, states in enumerate((layer.keys, layer.values)):
                    own[rows, part, :, :length] = states[row, :, num_slots - length :]
        self._set_lengths(lengths)

    @property
    def num_slots(self) -> int:
        """How many are used: the tokens of the longest row."""
        return self._longest

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [length + self._num_new for length in self._first_lengths]

    @property
    def positions(self) -> Tensor:
        """(B,) of the newest tokens."""
        return self._lengths - 1

    def open_slot(self) -> None:
        """Make room for one more token in every row; `append` writes it, layer by layer."""
        if self._longest == self._states.shape[4]:
            self._grow()
        self._longest += 1
        self._num_new += 1
        self._lengths = self._lengths + 1
        self.mask: Tensor | None = None  # (B, 1, 1, C) bool, what a row's newest token attends to
        if not self._is_even:
            slots = torch.arange(self._longest, device=self._lengths.device)
            self.mask = (slots < self._lengths[:, None])[:, None, None]
            self._newest = self._lengths - 1

    def attend(self, layer: int, query: Tensor, pair: Tensor, *, scaling: float) -> Tensor:
        """Each row's newest token attends to its own text, itself included.

        The query heads of a group take the places of tokens, so that their keys are not repeated.

        Args:
            query: (B, G, H / G, K). pair: as of `append`.
        Returns:
            (B, G, H / G, K).
        """
        keys, values = self.append(layer, pair)
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=self.mask, scale=scaling
        )

    def append(self, layer: int, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values (B, 2, G, K) into the open slot.

        Returns:
            All keys and values of the layer, (B, G, C, K), with the new ones.
        """
        own = self._layers[layer]  # (B, 2, G, C, K)
        if self._is_even:
            own.select(3, self._longest - 1).copy_(pair)
        else:
            own[self._rows, :, :, self._newest] = pair
        keys, values = own.narrow(3, 0, self._longest).unbind(1)
        return keys, values

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in ascending order."""
        for place, row in enumerate(rows):
            if place != row:
                used = self._states[:, row, ..., : self._longest, :]
                self._states[:, place, ..., : self._longest, :] = used
        self._states = self._states[:, : len(rows)]
        lengths = self.lengths
        self._set_lengths([lengths[row] for row in rows])

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        """Kept on both sides: asking the device for them would mean waiting for it."""
        self._first_lengths, self._num_new = lengths, 0
        self._longest = max(lengths)
        self._lengths = torch.tensor(lengths, device=self._states.device)
        self._is_even = min(lengths) == self._longest
        self._set_views()

    def _grow(self) -> None:
        more = min(self._longest + self._longest // 2, self._most_slots) - self._longest
        self._states = torch.nn.functional.pad(self._states, (0, 0, 0, max(more, 1)))
        self._set_views()

    def _set_views(self) -> None:
        """Slots beyond a row's length hold zeroes or old tokens: no NaN gets past a mask."""
        self._layers = self._states.unbind(0)
        self._rows = torch.arange(len(self._lengths), device=self._lengths.device)
