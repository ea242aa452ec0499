"""If this fails, a text or picture that is read alone out of a Parquet page is not the one that
pyarrow reads.
"""

import os
import random

import pyarrow
import pyarrow.parquet as parquet
import pytest

from dataset.records import page_values, parquet_pages
from dataset.records.parquet_pages import ParquetPages
from dataset.records.thrift import write_varint

PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
KINDS = {
    "text": pyarrow.string(),
    "binary": pyarrow.large_binary(),
    "picture": PICTURE,
    "pictures": pyarrow.list_(PICTURE),
    "lists": pyarrow.large_list(pyarrow.list_(pyarrow.string())),
    "few": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "required": pyarrow.list_(pyarrow.field("item", pyarrow.binary(), nullable=False)),
}
WRITERS = {
    "plain": {"use_dictionary": False, "compression": "none"},
    "snappy": {"use_dictionary": False, "compression": "snappy"},
    "dictionary": {"compression": "snappy", "dictionary_pagesize_limit": 3000},
    "second version": {"compression": "snappy", "data_page_version": "2.0"},
    "groups": {"compression": "none", "row_group_size": 37, "data_page_version": "2.0"},
}


def value_of(kind, dice: random.Random):
    """Something of a type; nothing now and then."""
    types = pyarrow.types
    if dice.random() < 0.15:
        return None
    if types.is_list(kind) or types.is_large_list(kind):
        found = [value_of(kind.value_type, dice) for _ in range(dice.choice([0, 1, 2, 5]))]
        return found if kind.value_field.nullable else [v for v in found if v is not None]
    if types.is_struct(kind):
        return {field.name: value_of(field.type, dice) for field in kind}
    word = dice.choice(["a", "日本", "", "the same again " * dice.randrange(30)])
    if types.is_string(kind) or types.is_dictionary(kind):
        return word
    return word.encode() + dice.randbytes(dice.choice([0, 5, 300]))


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch):
    monkeypatch.setattr(parquet_pages, "LARGE_BYTES", 0)


@pytest.fixture
def whole(monkeypatch) -> list[str]:
    """The columns of which something was unpacked whole."""
    names: list[str] = []
    unpack = ParquetPages._unpack

    def watched(self, name, block, leaf):
        names.append(name)
        return unpack(self, name, block, leaf)

    monkeypatch.setattr(ParquetPages, "_unpack", watched)
    return names


@pytest.mark.parametrize("page_bytes", [300, 1 << 20])
@pytest.mark.parametrize("writer", WRITERS)
def test_values_are_those_of_pyarrow(writer, page_bytes, whole, tmp_path):
    for seed in range(4):
        dice = random.Random(seed)
        made = {
            name: pyarrow.array([value_of(kind, dice) for _ in range(150)]).cast(kind)
            if name == "few"
            else pyarrow.array([value_of(kind, dice) for _ in range(150)], kind)
            for name, kind in KINDS.items()
        }
        table = pyarrow.table(made)
        path = tmp_path / f"{seed}.parquet"
        parquet.write_table(
            table, path, data_page_size=page_bytes, write_batch_size=3, **WRITERS[writer]
        )
        pages = ParquetPages(path)
        for row in dice.sample(range(150), 150):
            for name in KINDS:
                assert pages.value(name, row) == table[name][row].as_py(), (name, row)
    assert writer == "dictionary" or not whole


def test_values_of_several_pieces(whole, tmp_path):
    """Snappy packs 64 KiB at a time; values begin and end in any of them."""
    dice = random.Random(0)
    sizes = [0, 1, 65_530, 65_536, 200_000, 7, 131_072, 3]
    values = [dice.randbytes(size // 2) + bytes(size - size // 2) for size in sizes * 3]
    table = pyarrow.table({"image_bytes": values})
    for codec in ("none", "snappy"):
        path = tmp_path / f"{codec}.parquet"
        parquet.write_table(table, path, compression=codec, use_dictionary=False)
        pages = ParquetPages(path)
        assert [pages.value("image_bytes", i) for i in range(len(values))] == values
    assert not whole


@pytest.mark.parametrize("codec", ["zstd", "gzip", "brotli"])
def test_other_codecs_are_unpacked_whole(codec, whole, tmp_path):
    values = [b"a", b"", b"c" * 1000]
    parquet.write_table(pyarrow.table({"a": values}), tmp_path / "a.parquet", compression=codec)
    pages = ParquetPages(tmp_path / "a.parquet")
    assert [pages.value("a", i) for i in range(3)] == values and whole


def test_pieces_that_refer_to_one_before_are_not_taken():
    """As an encoder may write them: the last four bytes are a copy of some before."""
    first, second = os.urandom(65_536), os.urandom(100)
    literals = b"".join(
        bytes([62 << 2]) + (len(part) - 1).to_bytes(3, "little") + part for part in (first, second)
    )
    for distance, is_taken in ((100, True), (101, False), (65_636, False)):
        packed = write_varint(65_640) + literals
        packed += bytes([3 << 2 | 3]) + distance.to_bytes(4, "little")
        assert len(page_values.unpack(packed, 65_640)) == 65_640
        assert (page_values.snappy_pieces(packed) is not None) == is_taken


def test_pieces_of_another_size_are_not_taken():
    """A literal that goes on behind the first 64 KiB."""
    packed = write_varint(70_000) + bytes([62 << 2]) + (69_999).to_bytes(3, "little")
    assert page_values.snappy_pieces(packed + bytes(70_000)) is None


@pytest.mark.parametrize("more", [b"x", b"", None])
def test_values_that_do_not_fill_their_page_are_left_to_pyarrow(more):
    data = b"\x01\0\0\0a\x02\0\0\0bc" + (more or b"")
    data = data[:-1] if more is None else data
    body = page_values.Body(0, data, data)
    if more == b"":
        assert page_values._locate(body, 2).offsets.tolist() == [0, 5, 11]
    else:
        with pytest.raises(ValueError, match="do not end where their page does"):
            page_values._locate(body, 2)


def test_a_damaged_page_is_an_error_that_names_the_column(tmp_path):
    dice = random.Random(0)
    values = [dice.randbytes(2000) for _ in range(200)]
    path = tmp_path / "a.parquet"
    options = {"use_dictionary": False, "compression": "snappy", "write_statistics": False}
    parquet.write_table(pyarrow.table({"a": values}), path, **options)
    data = bytearray(path.read_bytes())
    data[3_000:300_000] = bytes(297_000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="column 'a' cannot be read"):
        ParquetPages(path).value("a", 100)


def test_what_is_kept_has_a_bound(monkeypatch, tmp_path):
    monkeypatch.setattr(parquet_pages, "MAX_LOCATED", 5)
    values = [os.urandom(100) for _ in range(100)]
    options = {"use_dictionary": False, "data_page_size": 200, "write_batch_size": 2}
    parquet.write_table(pyarrow.table({"a": values}), tmp_path / "a.parquet", **options)
    pages = ParquetPages(tmp_path / "a.parquet")
    for row in random.Random(0).sample(range(100), 100):
        assert pages.value("a", row) == values[row]
    assert len(pages._held.located) == 5
