"""Owns finding what a data set shares with a held-out one."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dataset.examining.faults import LEAKED_PICTURE, LEAKED_RECORD, Fault
from dataset.examining.likeness import Array, find_in
from dataset.examining.sources import Sources
from dataset.examining.tally import Tally, as_numpy


@dataclass(frozen=True)
class Leakage:
    """What is shared: `faults` by record of the data set; `figures` as JSON holds them; `pairs` of
    a record of the data set and one of the held-out set with like pictures, to be shown."""

    faults: dict[int, Fault]
    figures: dict[str, Any]
    pairs: list[tuple[int, int]]


def find_leakage(
    tally: Tally, sources: Sources, held_out: Tally, held_out_sources: Sources, *, num_pairs: int
) -> Leakage:
    """Compare by content of pictures, by their likeness, and by whole conversations.

    Equal answers alone are no leak, since short ones recur; their number is among the figures.
    """
    ours, theirs = tally.pictures.distinct(), held_out.pictures.distinct()
    is_equal = np.isin(ours.keys, theirs.keys)
    known = find_in(ours.hashes, ours.colours, theirs.hashes, theirs.colours)
    equal_at = np.searchsorted(theirs.keys, ours.keys[is_equal])
    known[is_equal] = equal_at
    faults: dict[int, Fault] = {}
    number = np.searchsorted(ours.keys, as_numpy(tally.pictures.key))  # of each row's picture
    for row in np.flatnonzero(known[number] >= 0):
        index, picture = int(tally.pictures.record[row]), int(number[row])
        where = held_out_sources.where(int(theirs.records[known[picture]]))
        how = "is also" if is_equal[picture] else "is like one"
        faults[index] = Fault(LEAKED_PICTURE, sources.where(index), f"its picture {how} in {where}")
    for index, other in _equal_keys(tally, held_out):
        where = held_out_sources.where(other)
        faults[index] = Fault(LEAKED_RECORD, sources.where(index), f"the same as {where}")
    shared = np.flatnonzero(known >= 0)
    pairs = np.stack([ours.records[shared], theirs.records[known[shared]]], axis=1).tolist()
    figures = {
        "held_out_records": len(held_out),
        "leaking_records": len(faults),
        "equal_pictures": int(is_equal.sum()),
        "like_pictures": len(shared) - int(is_equal.sum()),
        "equal_records": sum(fault.kind == LEAKED_RECORD for fault in faults.values()),
        "equal_answers": int(
            np.isin(as_numpy(tally.answer_key), as_numpy(held_out.answer_key)).sum()
        ),
    }
    return Leakage(faults, figures, [(a, b) for a, b in pairs[:num_pairs]])


def _equal_keys(tally: Tally, held_out: Tally) -> list[tuple[int, int]]:
    """Records of the set with the same conversation and pictures as one that is held out."""
    theirs: Array = as_numpy(held_out.key)
    order = np.argsort(theirs, kind="stable")
    rows = np.flatnonzero(np.isin(as_numpy(tally.key), theirs))
    at = order[np.searchsorted(theirs, as_numpy(tally.key)[rows], sorter=order)]
    return [
        (int(tally.record[row]), int(held_out.record[other]))
        for row, other in zip(rows, at, strict=True)
    ]
