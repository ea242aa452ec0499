"""Owns how the columns of values ("leaves") of a Parquet column make nested values.

A leaf has an entry for each of its values, and for each place where something above it is missing.
An entry's definition level says how much of the way down to it is there, its repetition level at
which list a new element begins; 0 begins a row.

Source: https://parquet.apache.org/docs/file-format/nestedencoding/
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow

Chain = tuple[pyarrow.Field, ...]  # from a column down to a leaf


class Entry(NamedTuple):
    """A leaf's value, None where there is none, and the levels at which it stands."""

    repetition: int
    definition: int
    value: Any


def chains_of(field: pyarrow.Field) -> list[Chain]:
    """The way down to each leaf below a field, in the order of Parquet's columns."""
    if not field.type.num_fields:
        return [(field,)]
    below = (field.type.field(i) for i in range(field.type.num_fields))
    return [(field, *chain) for one in below for chain in chains_of(one)]


def max_levels(chain: Chain) -> tuple[int, int]:
    """The highest repetition and definition level of a leaf."""
    num_lists = sum(is_list(field.type) for field in chain)
    return num_lists, num_lists + sum(field.nullable for field in chain)


def is_list(kind: pyarrow.DataType) -> bool:
    """Whether this is a list of any length."""
    return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def is_text(kind: pyarrow.DataType) -> bool:
    """Whether this is text in UTF-8, also one of few different ones."""
    types = pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind))


def is_bytes(kind: pyarrow.DataType) -> bool:
    """Whether this is text or bytes of any length, as `is_text`."""
    types = pyarrow.types
    plain = kind.value_type if types.is_dictionary(kind) else kind
    return is_text(kind) or bool(types.is_binary(plain) or types.is_large_binary(plain))


def is_divisible(kind: pyarrow.DataType) -> bool:
    """Whether the leaves of a column can be read one by one and put together again."""
    types = pyarrow.types
    if types.is_map(kind) or types.is_union(kind):
        return False
    return all(is_divisible(kind.field(i).type) for i in range(kind.num_fields))


def assemble(
    chain: Chain, entries: Sequence[Entry], *, repetition: int = 0, definition: int = 0
) -> Any:
    """What a leaf holds of a value of the first field of its chain.

    Args:
        entries: of this value, in order.
        repetition, definition: levels above the value.
    """
    field, first = chain[0], entries[0]
    if field.nullable:
        if first.definition <= definition:
            return None
        definition += 1
    if is_list(field.type):
        if first.definition <= definition:
            return []
        starts = [0, *(i for i, e in enumerate(entries) if i and e.repetition == repetition + 1)]
        levels = {"repetition": repetition + 1, "definition": definition + 1}
        ends = [*starts[1:], len(entries)]
        return [
            assemble(chain[1:], entries[start:end], **levels)
            for start, end in zip(starts, ends, strict=True)
        ]
    if len(chain) > 1:
        below = assemble(chain[1:], entries, repetition=repetition, definition=definition)
        return {chain[1].name: below}
    return first.value


def merge(left: Any, right: Any) -> Any:
    """One value of what two leaves hold of it: structs are united, lists element by element."""
    if isinstance(left, dict) and isinstance(right, dict):
        both = {name: merge(left[name], right[name]) for name in left.keys() & right.keys()}
        return left | right | both
    if isinstance(left, list) and isinstance(right, list):
        return [merge(*pair) for pair in zip(left, right, strict=True)]
    return left
