"""If this fails, a Parquet file as published gives other records than it holds, counts its rows of
text alone as bad, or needs more memory the larger it is.
"""

import itertools
import os
import pickle
import random

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from support.processor3 import make_processor3
from support.published_rows import FORMATS, LIST, TYPES, in_type, mixed_rows, picture, turns, write

from dataset.lm_dataset import BadSample, VLMDataset
from dataset.records import parquet_pages
from dataset.records.conversation import BadRecordError
from dataset.records.page_values import decode_runs
from dataset.records.parquet import ParquetRecords
from dataset.records.parquet_pages import ParquetPages
from dataset.records.stand_in import is_stand_in
from dataset.records.thrift import Reader, write_struct

NUM_ROWS = 900


@pytest.fixture(scope="module")
def processor3(tmp_path_factory):
    return make_processor3(tmp_path_factory.mktemp("tokenizer3"))


def random_images(dice: random.Random, *, in_lists: bool) -> list:
    pool = [dice.randbytes(dice.randrange(20, 900)) for _ in range(90)]
    if in_lists:
        return [
            None if dice.random() < 0.05 else dice.choices(pool, k=dice.randrange(5))
            for _ in range(NUM_ROWS)
        ]
    return [None if dice.random() < 0.05 else dice.choice(pool) for _ in range(NUM_ROWS)]


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("name", TYPES)
def test_every_layout_gives_its_rows_in_any_order(name, compression, tmp_path):
    dice = random.Random(f"{name}{compression}")
    images = random_images(dice, in_lists="list" in name)
    texts = [f"{i} " + "x" * dice.randrange(99) for i in range(NUM_ROWS)]
    path = tmp_path / "a.parquet"
    for version, dictionary, index in itertools.product(
        ("1.0", "2.0"), (True, False), (False, True)
    ):
        write(
            path,
            texts,
            in_type(images, name),
            text=dice.choice([pyarrow.string(), pyarrow.large_string()]),
            compression=compression,
            data_page_version=version,
            use_dictionary=dictionary,
            dictionary_pagesize_limit=dice.choice([9_000, 1 << 20]),
            write_page_index=index,
            row_group_size=dice.choice([250, NUM_ROWS]),
            data_page_size=9_000,
            write_batch_size=16,
        )
        pages = ParquetPages(path)
        rows = dice.sample(range(NUM_ROWS), 60)
        assert [pages.value("image_bytes", i) for i in rows] == [images[i] for i in rows]
        assert [pages.value("conversations", i) for i in rows] == [texts[i] for i in rows]
        if not dictionary and "dictionary" not in name:
            assert len(pages.blocks("image_bytes")) > 20


def test_memory_is_that_of_a_few_pages_whatever_the_row_group(tmp_path, monkeypatch):
    dice = random.Random(0)
    blobs = [dice.randbytes(2_000) for _ in range(NUM_ROWS)]
    path = tmp_path / "a.parquet"
    layout = {"data_page_size": 10_000, "write_batch_size": 8, "use_dictionary": False}
    write(path, ["x"] * NUM_ROWS, pyarrow.array(blobs), **layout)
    monkeypatch.setattr(parquet_pages, "HELD_BYTES", 200_000)  # of 1.8 MB in one row group
    pages = ParquetPages(path)
    assert pages._whole.num_row_groups == 1
    for row in dice.sample(range(NUM_ROWS), NUM_ROWS):
        assert pages.value("image_bytes", row) == blobs[row]
        held = pages._held.unpacked["image_bytes"].values()
        assert sum(one.get_total_buffer_size() for one in held) <= 200_000
    assert len(held) > 3


def test_a_block_larger_than_what_is_kept_is_not_unpacked_for_each_row(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    images = [random.Random(i).randbytes(900) for i in range(50)]
    write(path, ["x" * 999] * 50, pyarrow.array(images).dictionary_encode())
    monkeypatch.setattr(parquet_pages, "HELD_BYTES", 100)
    unpacked, unpack = [], ParquetPages._unpack
    monkeypatch.setattr(
        ParquetPages, "_unpack", lambda *asked: unpacked.append(asked[1]) or unpack(*asked)
    )
    pages = ParquetPages(path)
    for row in range(50):
        assert (pages.value("conversations", row), pages.value("image_bytes", row)) == (
            "x" * 999,
            images[row],
        )
    assert sorted(unpacked) == ["conversations", "image_bytes"]


def test_large_dictionaries_are_said_to_be_slow(tmp_path, monkeypatch):
    dice = random.Random(0)
    blobs = [dice.randbytes(2_000) for _ in range(100)]
    path = tmp_path / "a.parquet"
    images = pyarrow.array(blobs * 4).dictionary_encode()
    monkeypatch.setattr("dataset.records.parquet.HELD_BYTES", 300_000)
    write(path, ["x"] * 400, images, row_group_size=200)
    assert ParquetRecords(path).slowness is None
    write(path, ["x"] * 400, images, row_group_size=200, compression="zstd")
    assert "a.parquet: the dictionaries" in ParquetRecords(path).slowness
    assert "use_dictionary=False" in ParquetRecords(path).slowness


def test_headers_of_pages_are_found_once_and_travel_to_workers(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write(path, [turns("<image>")] * 20, pyarrow.array([[picture()]] * 20, LIST))
    records = ParquetRecords(path)
    first = records[3]
    monkeypatch.setattr(ParquetPages, "_find_blocks", None)
    assert pickle.loads(pickle.dumps(records))[3] == first


def test_a_forked_reader_does_not_move_the_others_place(tmp_path):
    path = tmp_path / "a.parquet"
    dice = random.Random(0)
    images = random_images(dice, in_lists=False)
    write(path, ["x"] * NUM_ROWS, pyarrow.array(images), data_page_size=5_000, write_batch_size=8)
    pages = ParquetPages(path)
    children = []
    for seed in range(3):
        child = os.fork()
        if not child:
            rows = random.Random(seed).choices(range(NUM_ROWS), k=300)
            os._exit(0 if all(pages.value("image_bytes", i) == images[i] for i in rows) else 1)
        children.append(child)
    assert all(pages.value("image_bytes", i) == images[i] for i in range(NUM_ROWS))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3


def test_thrift_writes_what_it_reads(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, ["x"] * 40, pyarrow.array([b"y"] * 40), row_group_size=2)
    data = path.read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    assert write_struct(Reader(footer).struct()) == footer


def test_levels_are_runs_and_bits_mixed():
    # Source: https://parquet.apache.org/docs/file-format/data-pages/encodings/ (RLE = 3)
    data = bytes([5 << 1, 1, (1 << 1) | 1, 0b00010110, 3 << 1, 0])
    assert (
        decode_runs(data, 16, num_bits=1).tolist() == [1] * 5 + [0, 1, 1, 0, 1, 0, 0, 0] + [0] * 3
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_black_8x8_picture_without_a_tag_is_a_record_of_text(kind, tmp_path):
    path, black = tmp_path / "a.parquet", picture(kind=kind)
    write(path, [turns(), turns("<image>")], pyarrow.array([black, black]))
    records = ParquetRecords(path)
    assert records[0].images == [] and records[1].images == [black]
    write(path, [turns()] * 2, pyarrow.array([[black], [black, black]], LIST))
    records = ParquetRecords(path)
    assert records[0].images == []
    with pytest.raises(BadRecordError, match=r"row 1: 0 <image> tag\(s\) but 2 image"):
        records[1]


@pytest.mark.parametrize(
    "image",
    [
        picture((0, 0, 9)),
        picture(size=(8, 9)),
        picture(size=(640, 480)),
        picture((1, 1, 1), kind="BMP"),
        picture()[:40],
        b"\0" * 64,
    ],
    ids=["blue", "8x9", "large", "nearly black", "cut", "no picture"],
)
def test_other_pictures_without_a_tag_stay_a_fault(image, tmp_path):
    path = tmp_path / "a.parquet"
    write(path, [turns()], pyarrow.array([image]))
    with pytest.raises(BadRecordError, match=r"^a.parquet:row 0: 0 <image> tag\(s\) but 1 image"):
        ParquetRecords(path)[0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "I;16"])
def test_stand_in_may_be_of_any_mode(mode):
    assert is_stand_in(picture(mode=mode))


def test_a_large_picture_is_not_decoded_to_see_that_it_is_no_stand_in(monkeypatch):
    large = picture(size=(640, 480))
    monkeypatch.setattr(Image.Image, "convert", None)
    assert not is_stand_in(large)


def test_wrong_types_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, [turns()], pyarrow.array(["0.png"]))
    with pytest.raises(ValueError, match="a.parquet: column 'image_bytes' is of type string; it"):
        ParquetRecords(path)


def test_a_damaged_page_is_a_bad_record_of_its_rows(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, [turns("<image>")] * 50, pyarrow.array([picture()] * 50), compression="zstd")
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    for place in range(chunk.dictionary_page_offset + 24, chunk.data_page_offset):
        data[place] ^= 0x5A
    path.write_bytes(data)
    with pytest.raises(BadRecordError, match=r"^a.parquet:row 7: column 'image_bytes' cannot be"):
        ParquetRecords(path)[7]
    data[chunk.dictionary_page_offset : chunk.dictionary_page_offset + 24] = b"\xff" * 24
    path.write_bytes(data)
    with pytest.raises(
        BadRecordError, match="row 7: .*pages of column 'image_bytes' cannot be fou"
    ):
        ParquetRecords(path)[7]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["list", "list of dictionary", "dictionary"])
def test_3000_rows_as_published_hold_no_bad_sample(name, processor3, tmp_path):
    texts, images = mixed_rows(random.Random(0))
    if name == "dictionary":
        one_each = [i for i, row in enumerate(images) if len(row) == 1]
        texts, images = [texts[i] for i in one_each], [images[i][0] for i in one_each]
    path = tmp_path / "sft_i2t.parquet"
    write(path, texts, in_type(images, name), row_group_size=1100, data_page_size=4096)
    dataset = VLMDataset(path, None, processor3, max_length=450, on_bad_sample="return")
    assert dataset.find_bad_records() == [] and dataset.has_images()
    for i in range(0, len(dataset), 1 if name == "list" else 4):
        sample = dataset[i]
        assert not isinstance(sample, BadSample), sample.reason
        assert len(sample.pixel_values) == texts[i].count("<image>")
