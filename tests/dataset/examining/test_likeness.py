"""If this fails, pictures or texts that are alike are not found, or others are called alike."""

import io

import numpy as np
from PIL import Image
from support.smooth import smooth_picture

from dataset.examining.likeness import (
    COLOUR_BYTES,
    find_in,
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


def test_pictures_are_alike_after_resizing_and_compression_only():
    photos = [smooth_picture(seed) for seed in range(40)]
    smaller = [p.resize((70, 60)) for p in photos[:10]]
    rougher = [compressed(p, quality=25) for p in photos[10:20]]
    hashes, colours = signatures_of([*photos, *smaller, *rougher])
    pairs = near_pictures(hashes, colours)
    assert pairs.tolist() == [[i, 40 + i] for i in range(20)]
    known = find_in(hashes[40:], colours[40:], hashes[:40], colours[:40])
    assert known.tolist() == list(range(20))
    assert find_in(hashes[20:40], colours[20:40], hashes[:20], colours[:20]).tolist() == [-1] * 20


def test_plain_pictures_of_other_colours_are_not_alike():
    plain = [Image.new("RGB", (50, 50), name) for name in ("red", "green", "blue", "#ff0202")]
    pairs = near_pictures(*signatures_of(plain))
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
    found = {tuple(pair) for pair in near_pictures(hashes, colours).tolist()}
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
    assert near_texts(signatures).tolist() == [[0, 1], [0, 2], [1, 2], [4, 5]]


def test_nothing_is_alike_in_nothing():
    hashes, colours = signatures_of([])
    assert near_pictures(hashes, colours).shape == (0, 2)
    assert find_in(*signatures_of([smooth_picture(0)]), hashes, colours).tolist() == [-1]
