"""Owns the figures of a whole data set, gathered from the findings of its records.

A record takes some 60 bytes and a picture of it 90, in arrays, so that memory stays small for
millions of them.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataset.examining.examine import Finding
from dataset.examining.likeness import (
    COLOUR_BYTES,
    NUM_MINIMA,
    Array,
    join_pairs,
    near_pictures,
    near_texts,
)

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
NUM_BARS = 40
MOST_FREQUENT = 5


@dataclass
class PictureTable:
    """The pictures of records, one row for each time that a record has one."""

    record: array[int] = field(default_factory=lambda: array("Q"))
    key: array[int] = field(default_factory=lambda: array("Q"))
    hash: array[int] = field(default_factory=lambda: array("Q"))
    width: array[int] = field(default_factory=lambda: array("I"))
    height: array[int] = field(default_factory=lambda: array("I"))
    num_bytes: array[int] = field(default_factory=lambda: array("Q"))
    colours: bytearray = field(default_factory=bytearray)

    def add(self, finding: Finding) -> None:
        for look in finding.pictures:
            self.record.append(finding.index)
            for name in ("key", "hash", "width", "height", "num_bytes"):
                getattr(self, name).append(getattr(look, name))
            self.colours += look.colours

    def distinct(self) -> DistinctPictures:
        """Each content once."""
        keys = as_numpy(self.key)
        _, first, counts = np.unique(keys, return_index=True, return_counts=True)
        colours = bytes_as(self.colours, np.uint8).reshape(-1, COLOUR_BYTES)
        return DistinctPictures(
            keys[first],
            as_numpy(self.hash)[first],
            colours[first],
            as_numpy(self.record)[first],
            counts,
        )


@dataclass(frozen=True)
class DistinctPictures:
    """Pictures by content, sorted by key: (N,) keys, hashes, records (the first that has it) and
    counts, (N, COLOUR_BYTES) colours."""

    keys: Array
    hashes: Array
    colours: Array
    records: Array
    counts: Array

    def __len__(self) -> int:
        return len(self.keys)


class Tally:
    """Gathers findings; those with a fault are counted by the caller."""

    def __init__(self) -> None:
        self.record = array("Q")
        self.num_turns = array("I")
        self.num_tokens = array("I")
        self.num_kept = array("I")
        self.num_supervised = array("I")
        self.num_image_tokens = array("I")
        self.num_images = array("I")
        self.key = array("Q")
        self.answer_key = array("Q")
        self.signatures = bytearray()
        self.languages: Counter[str] = Counter()
        self.num_with_system = 0
        self.num_with_tools = 0
        self.pictures = PictureTable()

    def add(self, finding: Finding) -> None:
        self.record.append(finding.index)
        self.num_images.append(len(finding.pictures))
        names = ("num_turns", "num_tokens", "num_kept", "num_supervised", "num_image_tokens")
        for name in (*names, "key", "answer_key"):
            getattr(self, name).append(getattr(finding, name))
        self.signatures += finding.signature
        self.languages[finding.language] += 1
        self.num_with_system += finding.has_system
        self.num_with_tools += finding.carries_tools
        self.pictures.add(finding)

    def __len__(self) -> int:
        return len(self.record)


def as_numpy(values: array[int]) -> Array:
    """The values, not copied."""
    return bytes_as(values, values.typecode)


def bytes_as(content: array[int] | bytearray, dtype: Any) -> Array:
    """What a buffer holds, not copied; it may be empty."""
    return np.frombuffer(content, dtype=dtype) if len(content) else np.zeros(0, dtype=dtype)


def percentiles(values: Array) -> dict[str, int]:
    """`PERCENTILES` by name, each a value that occurs; {} of nothing."""
    if not len(values):
        return {}
    found = np.percentile(values, PERCENTILES, method="lower")
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, found, strict=True)}


def histogram(values: Array) -> list[tuple[int, int, int]]:
    """Bars of equal width that hold all values: (from, to, number) each, `to` not in it."""
    if not len(values):
        return []
    low, high = int(values.min()), int(values.max()) + 1
    width = max(1, -(-(high - low) // NUM_BARS))
    counts = np.bincount((values.astype(np.int64) - low) // width)
    return [(low + i * width, low + (i + 1) * width, int(n)) for i, n in enumerate(counts)]


def padded_length(lengths: Array, batch_size: int) -> float:
    """Mean length of the longest of `batch_size` samples drawn at random: what each is padded to.

    P(the longest is at most t) = P(one is at most t) ** batch_size.
    """
    if not len(lengths):
        return 0.0
    values, counts = np.unique(lengths, return_counts=True)
    at_most = (np.cumsum(counts) / len(lengths)) ** batch_size
    return float((values * np.diff(at_most, prepend=0.0)).sum())


def summarise(tally: Tally, *, max_length: int, batch_size: int) -> dict[str, Any]:
    """All figures that need no other data set, as JSON holds them."""
    kept = as_numpy(tally.num_kept)
    return {
        "records": len(tally),
        "turns": int(as_numpy(tally.num_turns).sum()),
        "turns_of_a_record": percentiles(as_numpy(tally.num_turns)),
        "languages": dict(tally.languages.most_common()),
        "with_system_message": tally.num_with_system,
        "with_unread_tools": tally.num_with_tools,
        "tokens": {
            "percentiles": percentiles(as_numpy(tally.num_tokens)),
            "histogram": histogram(as_numpy(tally.num_tokens)),
            "max_seq_len": max_length,
            "num_cut": int((as_numpy(tally.num_tokens) > max_length).sum()),
            "lost_by_cuts": int((as_numpy(tally.num_tokens) - kept).sum()),
            "supervised_percentiles": percentiles(as_numpy(tally.num_supervised)),
            "supervised_histogram": histogram(as_numpy(tally.num_supervised)),
        },
        "epoch": {
            "samples": len(tally),
            "batch_size": batch_size,
            "steps": -(-len(tally) // batch_size),
            "tokens": int(kept.sum()),
            "image_tokens": int(as_numpy(tally.num_image_tokens).sum()),
            "supervised_tokens": int(as_numpy(tally.num_supervised).sum()),
            "padded_tokens": round(len(kept) * padded_length(kept, batch_size)),
        },
        "images": _images(tally),
        "answers": _answers(tally),
        "repeated_records": len(tally) - len(np.unique(as_numpy(tally.key))),
    }


def _images(tally: Tally) -> dict[str, Any]:
    table, distinct = tally.pictures, tally.pictures.distinct()
    pairs = near_pictures(distinct.hashes, distinct.colours)
    alike = join_pairs(pairs, len(distinct), most=MOST_FREQUENT)
    sizes = Counter(zip(table.width, table.height, strict=True)).most_common(MOST_FREQUENT)
    num_images = as_numpy(tally.num_images)
    return {
        "of_a_record": {str(n): int(c) for n, c in enumerate(np.bincount(num_images)) if c},
        "total": len(table.key),
        "distinct": len(distinct),
        "width": percentiles(as_numpy(table.width)),
        "height": percentiles(as_numpy(table.height)),
        "bytes": percentiles(as_numpy(table.num_bytes)),
        "most_frequent_sizes": [[w, h, n] for (w, h), n in sizes],
        "near_duplicate_groups": alike.num_groups,
        "near_duplicates": alike.num_members,
        # Records of the pairs, to be shown.
        "near_pairs": distinct.records[alike.first_pairs].tolist(),
    }


def _answers(tally: Tally) -> dict[str, Any]:
    keys = as_numpy(tally.answer_key)
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    signatures = bytes_as(tally.signatures, np.uint16).reshape(-1, NUM_MINIMA)[first]
    alike = join_pairs(near_texts(signatures), len(first), most=MOST_FREQUENT)
    records = as_numpy(tally.record)[first]
    most = np.argsort(-counts, kind="stable")[:MOST_FREQUENT]
    return {
        "distinct": len(first),
        "repeated": len(keys) - len(first),
        "near_duplicate_groups": alike.num_groups,
        "near_duplicates": alike.num_members,
        # Record and number of the most frequent answers; records of the pairs: to be shown.
        "most_frequent": [[int(records[i]), int(counts[i])] for i in most if counts[i] > 1],
        "near_pairs": records[alike.first_pairs].tolist(),
    }
