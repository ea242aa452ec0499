"""Owns telling what is alike: short signatures of pictures and texts, and the search in them.

- A picture: the difference hash, 64 bits, each saying whether a cell of 8 rows of 9 grey cells is
  brighter than its left neighbour; and 4 x 4 mean colours, for plain pictures show no differences.
  Two are alike if at most `NEAR_BITS` bits differ and every colour is within `NEAR_COLOUR`. So they
  are after a change of size or of compression; after a cut, mostly not.
- A text: MinHash, 16 numbers of 16 bits, from its runs of three letters without case, spaces and
  punctuation. The share of equal numbers estimates the share of runs that two texts have in common.

Source: https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html (difference
hash); Broder, On the resemblance and containment of documents, 1997 (MinHash).
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

HASH_SIZE = (9, 8)  # columns and rows of grey cells
COLOUR_SIDE = 4
COLOUR_BYTES = 3 * COLOUR_SIDE**2
NEAR_BITS, NEAR_COLOUR = 6, 24
NUM_MINIMA = 16
NEAR_MINIMA = 13  # equal of 16: some 80% of the runs of three letters
LONGEST_TEXT = 20_000  # characters that count
WINDOW = 16  # neighbours that are compared in a band: of many that agree in it some are missed
BLOCK = 1 << 22  # pairs that are compared at once
BOX = Image.Resampling.BOX
_GENERATOR = np.random.default_rng(20)
MULTIPLIERS = _GENERATOR.integers(1 << 63, size=NUM_MINIMA, dtype=np.uint64) * 2 + 1
RUN_MULTIPLIERS = _GENERATOR.integers(1 << 63, size=3, dtype=np.uint64) * 2 + 1

Array = np.ndarray[Any, np.dtype[Any]]


def content_key(content: bytes) -> int:
    """64 bits by which equal bytes are recognised."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def picture_hash(picture: Image.Image) -> int:
    """The difference hash."""
    grey = np.asarray(picture.convert("L").resize(HASH_SIZE, BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes())


def mean_colours(picture: Image.Image) -> bytes:
    """`COLOUR_BYTES` bytes: red, green and blue of each cell."""
    return picture.convert("RGB").resize((COLOUR_SIDE, COLOUR_SIDE), BOX).tobytes()


def plain_text(text: str) -> str:
    """Letters and digits alone, without case."""
    folded = unicodedata.normalize("NFKC", text[:LONGEST_TEXT]).casefold()
    return "".join(filter(str.isalnum, folded))


def text_signature(plain: str) -> Array:
    """MinHash of a text of letters and digits: (`NUM_MINIMA`,) uint16."""
    codes = np.frombuffer(plain.ljust(3, "\0").encode("utf-32-le", "replace"), dtype=np.uint32)
    a, b, c = RUN_MULTIPLIERS
    runs = codes[:-2] * a ^ codes[1:-1] * b ^ codes[2:] * c
    mixed = (runs ^ runs >> np.uint64(29))[:, None] * MULTIPLIERS
    minima: Array = (mixed >> np.uint64(48)).min(axis=0).astype(np.uint16)
    return minima


def near_pictures(hashes: Array, colours: Array) -> Iterator[Array]:
    """Pairs of pictures that are alike, piece by piece; a pair may come in several.

    All that differ in up to three bits are found, and most with more; where over `WINDOW` pictures
    agree in each of the four quarters of their hashes, some are missed.

    Args:
        hashes: (N,) uint64. colours: (N, `COLOUR_BYTES`) uint8.
    Yields:
        (number of pairs, 2), the smaller index first; at most N at a time.
    """

    def are_near(left: Array, right: Array) -> Array:
        near = np.bitwise_count(hashes[left] ^ hashes[right]) <= NEAR_BITS
        near[near] = _same_colours(colours[left[near]], colours[right[near]])
        return near

    bands = [(hashes >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]
    return _pairs_in_bands(bands, are_near)


def near_texts(signatures: Array) -> Iterator[Array]:
    """Pairs of texts that are alike, by (N, `NUM_MINIMA`) uint16 signatures; as `near_pictures`.

    Of two texts with 80% in common nine in ten are found.
    """

    def are_near(left: Array, right: Array) -> Array:
        equal: Array = (signatures[left] == signatures[right]).sum(axis=1) >= NEAR_MINIMA
        return equal

    bands = np.ascontiguousarray(signatures).view(np.uint64)
    return _pairs_in_bands([bands[:, i] for i in range(bands.shape[1])], are_near)


def _same_colours(left: Array, right: Array) -> Array:
    differences = np.abs(left.astype(np.int16) - right)
    is_same: Array = differences.max(axis=1, initial=0) <= NEAR_COLOUR
    return is_same


def _pairs_in_bands(bands: list[Array], are_near: Any) -> Iterator[Array]:
    """Pairs that agree in a band and are near, found among neighbours in the sorted band."""
    for band in bands:
        order = np.argsort(band, kind="stable")
        values = band[order]
        for step in range(1, min(WINDOW + 1, len(order))):
            same = np.flatnonzero(values[step:] == values[:-step])
            if not len(same):
                break
            left, right = order[same], order[same + step]
            near = are_near(left, right)
            yield np.sort(np.stack([left[near], right[near]], axis=1), axis=1)


def find_in(hashes: Array, colours: Array, known_hashes: Array, known_colours: Array) -> Array:
    """For each picture the index of a known picture like it, or -1; every pair is compared.

    Args:
        hashes: (N,) uint64. colours: (N, `COLOUR_BYTES`) uint8. known_hashes: (M,).
        known_colours: (M, `COLOUR_BYTES`).
    """
    found = np.full(len(hashes), -1, dtype=np.int64)
    size = max(1, BLOCK // max(1, len(known_hashes)))
    for start in range(0, len(hashes), size):
        block = hashes[start : start + size]
        near = np.bitwise_count(block[:, None] ^ known_hashes[None]) <= NEAR_BITS
        rows, known = np.nonzero(near)
        is_same = _same_colours(colours[start + rows], known_colours[known])
        found[start + rows[is_same]] = known[is_same]
    return found


@dataclass(frozen=True)
class Groups:
    """What pairs join: how many groups, how many members these have together, and the first pairs,
    (up to so many, 2), in rising order."""

    num_groups: int
    num_members: int
    first_pairs: Array


def join_pairs(pieces: Iterable[Array], num: int, *, most: int) -> Groups:
    """The groups of `num` things. No more than a piece of the pairs is in memory: where all things
    are alike, there are 64 pairs a thing.

    Args:
        pieces: of pairs, as `near_pictures` yields them. most: pairs that are named.
    """
    root = np.arange(num)
    is_member = np.zeros(num, dtype=bool)
    first = np.zeros(0, dtype=np.int64)
    for pairs in pieces:
        is_member[pairs] = True
        _join(root, pairs)
        first = np.unique(np.concatenate([first, pairs[:, 0] * num + pairs[:, 1]]))[:most]
    num_groups = len(np.unique(root[is_member]))
    return Groups(num_groups, int(is_member.sum()), np.stack(np.divmod(first, max(1, num)), axis=1))


def _join(root: Array, pairs: Array) -> None:
    """Make the smallest member of what `pairs` join the root of all its members."""
    left, right = root[pairs[:, 0]], root[pairs[:, 1]]
    while (differs := left != right).any():
        left, right = left[differs], right[differs]
        np.minimum.at(root, np.maximum(left, right), np.minimum(left, right))
        while (root[root] != root).any():
            root[:] = root[root]
        left, right = root[left], root[right]
