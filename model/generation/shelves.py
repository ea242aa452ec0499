"""Owns the keys and values of a batch whose rows come and go: texts of like length lie together.

A batch in one tensor would take as much room for each row as for its longest, and attend to as
much: one long question would slow all others and fill the memory. So rows lie on shelves, each for
texts of up to twice as many tokens as the one before; what outgrows its shelf moves on.

Shapes: L layers, B rows, T tokens, G heads of keys, C slots, H query heads, K head dim.
"""

import copy
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import Cache

from model.generation.key_values import KeyValues

SMALLEST = 256  # slots of a row on the first shelf
AHEAD = 8192  # slots: room for further rows is taken for at most so many

OwnerT = TypeVar("OwnerT")


class Past(Protocol):
    """What a token step needs of the keys and values, as `KeyValues` says it."""

    @property
    def num_slots(self) -> int: ...

    @property
    def positions(self) -> Tensor: ...

    def open_slot(self) -> None: ...

    def attend(self, layer: int, query: Tensor, pair: Tensor, *, scaling: float) -> Tensor: ...


def states_of(cache: Cache, row: int, length: int) -> Tensor:
    """The keys and values of one of the texts, which ends the row: (L, 2, G, T, K)."""
    layers: list[Any] = cache.layers
    return torch.stack(
        [
            torch.stack([part[row, :, -length:] for part in (layer.keys, layer.values)])
            for layer in layers
        ]
    )


class Shelf(KeyValues, Generic[OwnerT]):
    """Rows of up to `num_slots` tokens, each with its owner.

    Slots beyond a row's length hold zeroes: nothing of a row that has left is read by another.

    Args:
        states: (L, 2, G, T, K), the first row's.
    """

    def __init__(self, states: Tensor, owner: OwnerT, *, num_slots: int):
        num_layers, _, num_groups, num_tokens, width = states.shape
        self.owners = [owner]
        self._room = states.new_zeros(num_layers, 1, 2, num_groups, num_slots, width)
        self._room[:, 0, :, :, :num_tokens] = states
        self._set_rows([num_tokens])

    def put(self, states: Tensor, owner: OwnerT) -> None:
        """A row joins, as the last one."""
        row, num_tokens = len(self.owners), states.shape[3]
        if row == self._room.shape[1]:
            more = max(1, min(row, AHEAD // self._room.shape[4]))
            self._room = torch.cat((self._room, torch.zeros_like(self._room[:, :more])), 1)
        self._room[:, row, :, :, :num_tokens] = states
        self.owners.append(owner)
        self._set_rows([*self.lengths, num_tokens])

    def drop(self, row: int) -> None:
        """A row leaves, and the last one takes its place."""
        last, lengths = len(self.owners) - 1, self.lengths
        if row != last:
            used = max(lengths[row], lengths[last]) + 1  # and what a failed step may have left
            self._room[:, row, :, :, :used] = self._room[:, last, :, :, :used]
            self.owners[row], lengths[row] = self.owners[last], lengths[last]
        self._room[:, last].zero_()
        self.owners.pop()
        self._set_rows(lengths[:last])

    def states(self, row: int) -> Tensor:
        """Of a row, without a copy: (L, 2, G, T, K)."""
        return self._room[:, row, :, :, : self.lengths[row]]

    def alone(self, row: int) -> KeyValues:
        """A row as a batch of its own, in the same memory."""
        own = copy.copy(self)
        own._states = self._states[:, row : row + 1]
        own._set_lengths([self.lengths[row]])
        return own

    def reset(self, lengths: list[int]) -> None:
        """Go back to these lengths; what was written beyond is written anew."""
        self._set_lengths(lengths)

    def _set_rows(self, lengths: list[int]) -> None:
        self._states = self._room[:, : len(lengths)]
        if lengths:
            self._set_lengths(lengths)


class Shelves(Generic[OwnerT]):
    """The keys and values of a batch, `Past` of its token steps; the rows' order is `owners`."""

    def __init__(self) -> None:
        self._shelves: dict[int, Shelf[OwnerT]] = {}  # by slots of a row, in ascending order
        self._lengths: list[list[int]] = []  # of each shelf before the last slot was opened

    @property
    def owners(self) -> list[OwnerT]:
        return [owner for shelf in self._shelves.values() for owner in shelf.owners]

    @property
    def full(self) -> list[OwnerT]:
        """Whose rows have no free slot: `move` them before the next step."""
        return [
            owner
            for num_slots, shelf in self._shelves.items()
            for owner, length in zip(shelf.owners, shelf.lengths, strict=True)
            if length == num_slots
        ]

    def put(self, states: Tensor, owner: OwnerT) -> None:
        """A row joins. An error, for want of memory, leaves the others as they are.

        Args:
            states: (L, 2, G, T, K); they are copied.
        """
        num_slots = SMALLEST
        while num_slots <= states.shape[3]:  # one is free for the next token
            num_slots *= 2
        if num_slots in self._shelves:
            self._shelves[num_slots].put(states, owner)
        else:
            shelf = Shelf(states, owner, num_slots=num_slots)
            self._shelves = dict(sorted({**self._shelves, num_slots: shelf}.items()))

    def drop(self, owner: OwnerT) -> None:
        """A row leaves; an empty shelf gives its memory back."""
        num_slots, row = self._find(owner)
        self._drop(num_slots, row)

    def move(self, owner: OwnerT) -> None:
        """A row goes to a shelf with a free slot for it; an error leaves it where it is."""
        num_slots, row = self._find(owner)
        self.put(self._shelves[num_slots].states(row), owner)
        self._drop(num_slots, row)

    def alone(self, owner: OwnerT) -> KeyValues:
        """A row as a batch of its own, in the same memory."""
        num_slots, row = self._find(owner)
        return self._shelves[num_slots].alone(row)

    @property
    def num_slots(self) -> int:
        return max(shelf.num_slots for shelf in self._shelves.values())

    @property
    def positions(self) -> Tensor:
        return torch.cat([shelf.positions for shelf in self._shelves.values()])

    def open_slot(self) -> None:
        self._lengths = [shelf.lengths for shelf in self._shelves.values()]
        for shelf in self._shelves.values():
            shelf.open_slot()

    def close_slot(self) -> None:
        """Undo `open_slot`, after a step that failed."""
        for shelf, lengths in zip(self._shelves.values(), self._lengths, strict=True):
            shelf.reset(lengths)

    def attend(self, layer: int, query: Tensor, pair: Tensor, *, scaling: float) -> Tensor:
        shelves = list(self._shelves.values())
        if len(shelves) == 1:
            return shelves[0].attend(layer, query, pair, scaling=scaling)
        sizes = [len(shelf.owners) for shelf in shelves]
        rows = zip(shelves, query.split(sizes), pair.split(sizes), strict=True)
        return torch.cat([shelf.attend(layer, q, kv, scaling=scaling) for shelf, q, kv in rows])

    def _find(self, owner: OwnerT) -> tuple[int, int]:
        for num_slots, shelf in self._shelves.items():
            for row, own in enumerate(shelf.owners):
                if own is owner:
                    return num_slots, row
        raise AssertionError("the row has left")

    def _drop(self, num_slots: int, row: int) -> None:
        shelf = self._shelves[num_slots]
        if len(shelf.owners) == 1:
            del self._shelves[num_slots]
        else:
            shelf.drop(row)
