"""If this fails, pictures or texts that are alike are not found, or others are called alike."""

import io
import tracemalloc

import numpy as np
from PIL import Image
from support.smooth import smooth_picture

from dataset.examining.likeness import (
    COLOUR_BYTES,
    find_in,
    join_pairs,
    mean_colours,
    near_pictures,
    near_texts,
    picture_hash,
    plain_text,
    text_signature,
)


def compressed(picture, *, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def signatures_of(pictures):
    hashes = np.array([picture_hash(p) for p in pictures], dtype=np.uint64)
    colours = b"".join(map(mean_colours, pictures))
    return hashes, np.frombuffer(colours, dtype=np.uint8).reshape(-1, COLOUR_BYTES)


def whole(pieces):
    return np.unique(np.concatenate([np.zeros((0, 2), dtype=np.int64), *pieces]), axis=0)


def test_pictures_are_alike_after_resizing_and_compression_only():
    photos = [smooth_picture(seed) for seed in range(40)]
    smaller = [p.resize((70, 60)) for p in photos[:10]]
    rougher = [compressed(p, quality=25) for p in photos[10:20]]
    hashes, colours = signatures_of([*photos, *smaller, *rougher])
    pairs = whole(near_pictures(hashes, colours))
    assert pairs.tolist() == [[i, 40 + i] for i in range(20)]
    known = find_in(hashes[40:], colours[40:], hashes[:40], colours[:40])
    assert known.tolist() == list(range(20))
    assert find_in(hashes[20:40], colours[20:40], hashes[:20], colours[:20]).tolist() == [-1] * 20


def test_plain_pictures_of_other_colours_are_not_alike():
    plain = [Image.new("RGB", (50, 50), name) for name in ("red", "green", "blue", "#ff0202")]
    pairs = whole(near_pictures(*signatures_of(plain)))
    assert pairs.tolist() == [[0, 3]]  # nearly the same red


def test_pairs_are_those_of_comparing_all():
    dice = np.random.default_rng(0)
    hashes = dice.integers(1 << 63, size=2000, dtype=np.uint64) * np.uint64(2)
    for index in range(300):  # up to three bits differ from another's
        bits = dice.choice(64, size=dice.integers(0, 4), replace=False).astype(np.uint64)
        hashes[1000 + index] = hashes[index] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=0)
    colours = np.zeros((2000, COLOUR_BYTES), dtype=np.uint8)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(distance <= 3, 1)).tolist()
    found = {tuple(pair) for pair in whole(near_pictures(hashes, colours)).tolist()}
    assert len(expected) >= 300 and all(tuple(pair) in found for pair in expected)
    assert all(distance[pair] <= 6 for pair in found)


def test_texts_are_alike_by_what_they_share():
    base = "A brown dog runs over the green grass behind a yellow ball near the old house"
    texts = [
        base,
        base + " now",
        base.upper() + "!",
        "Two men in hats are playing the violin on a small stage before many people",
        "一个男人在海边的沙滩上和他的狗一起跑步，天空很蓝，海浪很大。",
        "一个男人在海边的沙滩上和他的狗一起跑步，天空很蓝，海浪很大",
        "",
        "a",
    ]
    signatures = np.stack([text_signature(plain_text(text)) for text in texts])
    assert whole(near_texts(signatures)).tolist() == [[0, 1], [0, 2], [1, 2], [4, 5]]


def test_nothing_is_alike_in_nothing():
    hashes, colours = signatures_of([])
    alike = join_pairs(near_pictures(hashes, colours), 0, most=5)
    assert (alike.num_groups, alike.num_members, len(alike.first_pairs)) == (0, 0, 0)
    assert find_in(*signatures_of([smooth_picture(0)]), hashes, colours).tolist() == [-1]


def test_groups_are_those_that_pairs_join():
    dice = np.random.default_rng(1)
    pieces = [np.sort(dice.integers(400, size=(60, 2)), axis=1) for _ in range(4)]
    pieces = [pairs[pairs[:, 0] < pairs[:, 1]] for pairs in pieces]
    groups = [{number} for number in range(400)]
    for left, right in np.concatenate(pieces).tolist():
        together = groups[left] | groups[right]
        for number in together:
            groups[number] = together
    joined = {frozenset(group) for group in groups if len(group) > 1}
    alike = join_pairs(iter(pieces), 400, most=5)
    assert alike.num_groups == len(joined) > 5
    assert alike.num_members == sum(map(len, joined))
    assert alike.first_pairs.tolist() == whole(pieces)[:5].tolist()


def test_memory_for_a_text_stays_where_all_texts_are_alike():
    """There are 64 pairs a text, which must not be held all at once."""
    signature = text_signature(plain_text("The same sentence of many words"))
    signatures = np.tile(signature, (3000, 1))
    tracemalloc.start()
    alike = join_pairs(near_texts(signatures), len(signatures), most=5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (alike.num_groups, alike.num_members) == (1, 3000)
    assert peak < 300 * len(signatures)
