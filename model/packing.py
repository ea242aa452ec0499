"""Owns packing: the tokens of a padded batch laid end to end as one row, without the padding.

Layers compute on the row; attention, which stays within a sample, on the padded batch again.

Shapes: B batch, T tokens (padding included), N tokens of the row, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the row's tokens stand in the padded batch.

    Args:
        positions: (N,) into the flattened (B, T), ascending.
    """

    positions: Tensor
    batch_size: int
    num_tokens: int

    @property
    def position_ids(self) -> Tensor:  # (1, N)
        """Each sample's tokens are counted from 0."""
        return (self.positions % self.num_tokens)[None]

    def pack(self, states: Tensor) -> Tensor:  # (B, T, C) -> (1, N, C)
        return states.flatten(0, 1).index_select(0, self.positions)[None]

    def unpack(self, states: Tensor) -> Tensor:  # (1, N, C) -> (B, T, C)
        """Padding is 0."""
        row = states[0]
        flat = row.new_zeros(self.batch_size * self.num_tokens, row.shape[1])
        return flat.index_copy(0, self.positions, row).view(self.batch_size, self.num_tokens, -1)

    def within(self, positions: Tensor) -> Tensor:  # (M,) -> (M,)
        """Positions in the flattened (B, T), all of them of packed tokens, as positions in the
        row."""
        return torch.searchsorted(self.positions, positions)
