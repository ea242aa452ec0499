"""If this fails, features that are kept come back as others, or damaged ones are used."""

import os
import pickle

import pytest
import torch

from dataset.features.reading import CachedFeatures, name_key
from dataset.features.shards import Layout, ShardMaps, ShardWriter, content_key
from dataset.features.survey import Index, discard_damaged
from dataset.features.table import KEY_TYPE, Table

KEYS = [content_key(bytes([i])) for i in range(5)]


def features() -> torch.Tensor:
    return torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0)) * 3


def write(folder, layout: Layout, keys=KEYS) -> None:
    writer = ShardWriter(folder)
    for key, one in zip(keys, features(), strict=True):
        writer.append(layout.pack(key, one))
    writer.close()


def read(folder, layout: Layout, warn=pytest.fail) -> list[torch.Tensor | None]:
    index = Index(folder, layout)
    names = Table(((name_key(f"{i}.png"), key) for i, key in enumerate(KEYS)), dtype=KEY_TYPE)
    maps = ShardMaps(index.paths, layout)
    cached = CachedFeatures(maps, places=Table(index.items(), dtype="i8"), names=names, warn=warn)
    cached = pickle.loads(pickle.dumps(cached)) if warn is pytest.fail else cached
    by_name = [cached.get(f"{i}.png") for i in range(5)]
    for i, one in enumerate(by_name):
        other = cached.get(bytes([i]))
        assert one is other is None or torch.equal(one, other)
    assert cached.get("another.png") is None and cached.get(b"another") is None
    return by_name


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_features_come_back_as_rounded(dtype, tmp_path):
    layout = Layout(6, 7, dtype, b"tower")
    write(tmp_path, layout)
    assert next(tmp_path.iterdir()).stat().st_size == 5 * layout.entry_bytes
    for wanted, found in zip(features(), read(tmp_path, layout), strict=True):
        if dtype != "int8":
            assert torch.equal(found, wanted.to(getattr(torch, dtype)))
        else:
            step = wanted.abs().amax(1, keepdim=True) / 127
            assert ((found - wanted).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_what_a_format_cannot_hold_is_not_kept(value):
    one = features()[0]
    one[2, 3] = value
    assert Layout(6, 7, "float16", b"").pack(KEYS[0], one) is None
    is_finite = value == 1e5
    for dtype in ("float32", "int8"):
        assert (Layout(6, 7, dtype, b"").pack(KEYS[0], one) is not None) == is_finite


def test_a_token_of_zeros_stays_one():
    layout = Layout(6, 7, "int8", b"")
    entry = layout.pack(KEYS[0], torch.zeros(6, 7))
    assert torch.equal(layout.unpack(memoryview(entry)), torch.zeros(6, 7))


def test_a_torn_tail_counts_up_to_its_last_whole_entry(tmp_path):
    layout = Layout(6, 7, "float16", b"tower")
    write(tmp_path, layout)
    shard = next(tmp_path.iterdir())
    os.truncate(shard, 5 * layout.entry_bytes - 1)
    found = read(tmp_path, layout)
    assert found[4] is None and all(one is not None for one in found[:4])


@pytest.mark.parametrize("offset", [0, 5, 9, 30, -1])
def test_a_flipped_bit_is_seen_and_discarded(offset, tmp_path):
    layout = Layout(6, 7, "float16", b"tower")
    write(tmp_path, layout)
    shard = next(tmp_path.iterdir())
    data = bytearray(shard.read_bytes())
    data[2 * layout.entry_bytes + offset % layout.entry_bytes] ^= 4
    shard.write_bytes(data)
    said: list[str] = []
    found = read(tmp_path, layout, said.append)
    assert found[2] is None and sum(one is None for one in found) == 1
    index = Index(tmp_path, layout)
    damaged: list[bytes] = []
    list(discard_damaged(index, list(index.places), damaged))
    is_named = offset not in (0, 9)  # magic and key: there is no entry of this picture any more
    assert len(said) == is_named and len(damaged) == (offset != 0)
    read(tmp_path, layout)  # without a word


def test_entries_of_another_tower_are_never_read(tmp_path):
    write(tmp_path, Layout(6, 7, "float16", b"another tower"))
    said: list[str] = []
    assert read(tmp_path, Layout(6, 7, "float16", b"tower"), said.append) == [None] * 5
    assert len(said) == 5 and "damaged" in said[0]


def test_keys_that_end_in_zeros_are_found():
    keys = [os.urandom(16 - n) + bytes(n) for n in range(17) for _ in range(3 if n < 14 else 1)]
    table = Table(((key, i) for i, key in enumerate(keys)), dtype="i8")
    assert [table.find(key) for key in keys] == list(range(len(keys)))
    assert table.find(os.urandom(16)) is None and Table([], dtype="i8").find(keys[0]) is None


def test_a_full_disk_leaves_whole_entries(tmp_path, monkeypatch):
    layout = Layout(6, 7, "float16", b"tower")
    writer = ShardWriter(tmp_path)
    entry = layout.pack(KEYS[0], features()[0])
    writer.append(entry)
    real = writer._file

    class Short:
        def write(self, data):
            return real.write(data[:9])

        def __getattr__(self, name):
            return getattr(real, name)

    writer._file = Short()
    with pytest.raises(OSError, match="--cache_gb"):
        writer.append(entry)
    assert next(tmp_path.iterdir()).stat().st_size == len(entry)
