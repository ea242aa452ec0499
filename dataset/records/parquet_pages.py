"""Owns random access to the rows of a Parquet file, in a memory that does not grow with the file.

A file's row groups may be of many gigabytes, but each column of one is cut into pages (a megabyte
in most files) that can be unpacked alone. Their headers say where they lie:

1. A column of structs is several columns of values ("leaves" here), each with pages of its own.
2. The headers of a leaf in a row group are read once, when the first row of the group is asked for,
   and mostly without what follows them: a list of `Block`s.
3. To read a row, its block is made a little Parquet file in memory: the block's pages behind the
   dictionary they need, and a footer that names them alone. pyarrow reads that.
4. The blocks of a leaf read last are kept, up to `HELD_BYTES`, which files read together share.

Pages that refer to a dictionary are one block, since reading any of them unpacks the dictionary.

Source: https://parquet.apache.org/docs/file-format/ and parquet.thrift (the numbers of fields).
"""

import contextlib
import itertools
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from dataset.records.thrift import I64, LIST, STRUCT, Reader, Struct, write_struct

HELD_BYTES = 1 << 28  # of a leaf's unpacked blocks, in each process
HEADER_BYTES = 1 << 12  # read for a page's header at first; statistics in it may take more
MAGIC = b"PAR1"
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
DICTIONARY_ENCODINGS = (2, 8)
RUN_LENGTH = 3  # the encoding of levels
WHOLE = -1  # in place of a leaf: a column that is read by row groups


@dataclass(frozen=True)
class Block:
    """Rows of a column that are unpacked together.

    first_row, num_rows: in the row group. group: the row group. start, end: where the pages lie in
    the file, in bytes; 0 and 0 for a column that is not read by pages. num_values: as the headers
    count them. dictionary: where the dictionary's page lies, if they need it.
    """

    first_row: int
    num_rows: int
    group: int
    start: int = 0
    end: int = 0
    num_values: int = 0
    dictionary: tuple[int, int] | None = None


@dataclass(frozen=True)
class Page:
    """A data page: where it lies, how many rows begin in it, whether a row from before goes on."""

    start: int
    end: int
    num_values: int
    num_rows: int
    goes_on: bool
    has_dictionary: bool


class Held(dict[str, OrderedDict[tuple[Path, int, int], pyarrow.ChunkedArray]]):
    """Unpacked blocks by leaf, then by file, row group and number; the one used longest ago first.
    None travels to another process."""

    def __reduce__(self) -> Any:
        return Held, ()


class ParquetPages:
    """The columns of a Parquet file by row.

    Args:
        held: the blocks that are kept, of several files that are read together.
    Raises:
        ValueError: not a readable Parquet file.
    """

    def __init__(self, path: Path, *, held: Held | None = None):
        self.path = path
        try:
            self._whole = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({why_not(path, error)})") from (
                None
            )
        self.schema = self._whole.schema_arrow
        self.num_rows = int(self._whole.metadata.num_rows)
        self._file = open(path, "rb")
        self._owner = os.getpid()
        self._blocks: dict[tuple[int, int], list[Block]] = {}  # by leaf and row group
        self._held = Held() if held is None else held
        metadata = self._whole.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(self._whole.num_row_groups)]
        self._group_starts = [0, *itertools.accumulate(sizes)]
        self._leaves = {field.name: self._leaves_of(field) for field in self.schema}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_blocks": self._blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]  # there are no subclasses
        self._blocks = state["_blocks"]

    def _read(self, start: int, end: int) -> bytes:
        if self._owner != os.getpid():  # a forked worker would move the position for all
            self._file, self._owner = open(self.path, "rb"), os.getpid()
        self._file.seek(start)
        return self._file.read(end - start)

    @cached_property
    def _footer(self) -> Struct:
        size = self.path.stat().st_size
        length = int.from_bytes(self._read(size - 8, size - 4), "little")
        return Reader(self._read(size - 8 - length, size - 8)).struct()

    def value(self, name: str, row: int) -> Any:
        """The value of a column in a row, as a Python object.

        Raises:
            ValueError: what holds it is damaged.
        """
        group = bisect_right(self._group_starts, row) - 1
        row -= self._group_starts[group]
        values = [self._leaf_value(leaf, group, row, name=name) for leaf in self._leaves[name]]
        return reduce(merge, values)

    def _leaf_value(self, leaf: int, group: int, row: int, *, name: str) -> Any:
        """What a leaf holds of a column's value in a row of a row group."""
        blocks = self._blocks_in(leaf, group, name=name)
        number = bisect_right(blocks, row, key=lambda block: block.first_row) - 1
        held = self._held.setdefault(self._path_of(leaf, name), OrderedDict())
        key = (self.path, group, number)
        if key in held:
            held.move_to_end(key)
        else:
            try:
                held[key] = self._unpack(name, blocks[number], leaf)
            except (pyarrow.ArrowException, OSError) as error:
                first_line = str(error).partition("\n")[0]
                raise ValueError(f"column {name!r} cannot be read ({first_line})") from None
            make_room(held)
        return held[key][row - blocks[number].first_row].as_py()

    def dictionary_sizes(self, name: str) -> list[int]:
        """Sizes of the column's dictionaries as they lie in the file, in bytes."""
        sizes = []
        for group in range(self._whole.num_row_groups):
            for leaf in self._leaves[name]:
                chunk = self._whole.metadata.row_group(group).column(max(leaf, 0))
                if leaf != WHOLE and chunk.has_dictionary_page and chunk.dictionary_page_offset:
                    sizes.append(max(0, chunk.data_page_offset - chunk.dictionary_page_offset))
        return sizes

    def blocks(self, name: str) -> list[Block]:
        """The blocks of a column's first leaf; raises ValueError where a header is damaged."""
        leaf, groups = self._leaves[name][0], range(self._whole.num_row_groups)
        return [block for group in groups for block in self._blocks_in(leaf, group, name=name)]

    def _blocks_in(self, leaf: int, group: int, *, name: str) -> list[Block]:
        """The blocks of a leaf in a row group."""
        if (leaf, group) not in self._blocks:
            try:
                self._blocks[leaf, group] = list(self._find_blocks(leaf, group))
            except (IndexError, KeyError, ValueError, OSError, pyarrow.ArrowException) as error:
                raise ValueError(
                    f"{self.path}: the pages of column {name!r} cannot be found "
                    f"({type(error).__name__}: {error}); fetch or write the file again"
                ) from error
        return self._blocks[leaf, group]

    def _leaves_of(self, field: pyarrow.Field) -> list[int]:
        """Numbers of the columns of values below a field; `WHOLE` alone if they cannot be read one
        by one."""
        schema = self._whole.schema
        below = [i for i in range(len(schema)) if schema.column(i).path.split(".")[0] == field.name]
        return below if below and is_divisible(field.type) else [WHOLE]

    def _path_of(self, leaf: int, name: str) -> str:
        return name if leaf == WHOLE else str(self._whole.schema.column(leaf).path)

    def _find_blocks(self, leaf: int, group: int) -> Iterator[Block]:
        if leaf == WHOLE:
            yield Block(0, self._whole.metadata.row_group(group).num_rows, group)
        else:
            yield from self._blocks_of_group(group, leaf)

    def _blocks_of_group(self, group: int, leaf: int) -> Iterator[Block]:
        block: Block | None = None
        first_row, end_row = 0, self._whole.metadata.row_group(group).num_rows
        dictionary, pages = self._pages(group, leaf)
        for page in pages:
            shares_dictionary = page.has_dictionary and block is not None and block.dictionary
            if block is not None and (page.goes_on or shares_dictionary):
                block = replace(
                    block,
                    num_rows=block.num_rows + page.num_rows,
                    end=page.end,
                    num_values=block.num_values + page.num_values,
                    dictionary=dictionary if page.has_dictionary else block.dictionary,
                )
                continue
            if block is not None:
                yield block
                first_row += block.num_rows
            needed = dictionary if page.has_dictionary else None
            block = Block(
                first_row, page.num_rows, group, page.start, page.end, page.num_values, needed
            )
        if block is not None:
            yield block
            first_row += block.num_rows
        if first_row != end_row:
            raise ValueError(f"row group {group} ends at row {first_row}, not at {end_row}")

    def _pages(self, group: int, leaf: int) -> tuple[tuple[int, int] | None, list[Page]]:
        """Where a column's dictionary lies in a row group, and its data pages."""
        chunk = self._whole.metadata.row_group(group).column(leaf)
        dictionary, pages, left = None, [], chunk.num_values
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset:
            start = min(start, chunk.dictionary_page_offset)
        while left:
            header, body = self._page_header(start)
            kind, end = header[1][1], body + header[3][1]
            if kind == DICTIONARY_PAGE:
                dictionary = start, end
            elif kind in (DATA_PAGE, DATA_PAGE_V2):
                about = header[5 if kind == DATA_PAGE else 8][1]
                encoding = about[2 if kind == DATA_PAGE else 4][1]
                num_rows, goes_on = self._rows_of_page(group, leaf, header, body)
                has_dictionary = encoding in DICTIONARY_ENCODINGS
                pages.append(Page(start, end, about[1][1], num_rows, goes_on, has_dictionary))
                left -= about[1][1]
            start = end
        return dictionary, pages

    def _page_header(self, start: int) -> tuple[Struct, int]:
        """A page's header, and where what follows it begins."""
        length = HEADER_BYTES
        while True:
            data = self._read(start, start + length)
            reader = Reader(data)
            try:
                return reader.struct(), start + reader.position
            except IndexError:
                if len(data) < length:
                    raise
                length *= 16

    def _rows_of_page(self, group: int, leaf: int, header: Struct, body: int) -> tuple[int, bool]:
        """How many rows begin in a page, and whether a row of the page before goes on in it."""
        if header[1][1] == DATA_PAGE_V2:
            return header[8][1][3][1], False
        num_values = header[5][1][1][1]
        about = self._whole.metadata.row_group(group)
        if about.column(leaf).num_values == about.num_rows:
            return num_values, False  # each row has one value, or is an empty list
        if header[5][1][4][1] != RUN_LENGTH:
            raise ValueError("levels of an encoding that is no longer in use")
        data = self._read(body, body + header[3][1])
        codec = about.column(leaf).compression.lower()
        if codec != "uncompressed":
            codec = "lz4_raw" if codec == "lz4" else codec
            data = pyarrow.decompress(data, header[2][1], codec, asbytes=True)
        max_level = self._whole.schema.column(leaf).max_repetition_level
        levels = decode_levels(data[4:], num_values, max_level=max_level)
        return int((levels == 0).sum()), bool(levels[0])

    def _unpack(self, name: str, block: Block, leaf: int) -> pyarrow.ChunkedArray:
        if leaf == WHOLE:
            return self._whole.read_row_group(block.group, columns=[name])[name]
        path = self._path_of(leaf, name)
        kept = [path] if block.dictionary else None
        packed = pyarrow.BufferReader(self._little_file(block, leaf))
        file = pyarrow.parquet.ParquetFile(packed, read_dictionary=kept)
        return file.read(columns=[path], use_threads=False)[name]

    def _little_file(self, block: Block, leaf: int) -> bytes:
        """A Parquet file of a block, in which the other columns are named but not there."""
        dictionary = self._read(*block.dictionary) if block.dictionary else b""
        pages = self._read(block.start, block.end)
        size = len(dictionary) + len(pages)
        group = dict(self._footer[4][1][1][block.group])
        chunks = list(group[1][1][1])
        chunk, about = dict(chunks[leaf]), dict(chunks[leaf][3][1])
        about |= {
            5: (I64, block.num_values),
            7: (I64, size),
            9: (I64, len(MAGIC) + len(dictionary)),
        }
        for field in (10, 11, 12, 13, 14, 15, 16):  # offsets of what is left out; statistics
            about.pop(field, None)
        if dictionary:
            about[11] = (I64, len(MAGIC))
        chunks[leaf] = {2: chunk[2], 3: (STRUCT, about)}
        group = {1: (LIST, (STRUCT, chunks)), 2: group[2], 3: (I64, block.num_rows)}
        footer = write_struct(
            self._footer | {3: (I64, block.num_rows), 4: (LIST, (STRUCT, [group]))}
        )
        return b"".join(
            (MAGIC, dictionary, pages, footer, len(footer).to_bytes(4, "little"), MAGIC)
        )


def why_not(path: Path, error: Exception) -> str:
    """Why a file cannot be read as Parquet."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(len(MAGIC))
        if head == MAGIC:
            return "it is cut off, or damaged at its end; fetch it again"
        if head == b"vers":
            return "a git-lfs pointer; run `git lfs pull`"
    return str(error).partition("\n")[0]


def is_divisible(kind: pyarrow.DataType) -> bool:
    """Whether the leaves of a column can be read one by one and put together again."""
    types = pyarrow.types
    if types.is_map(kind) or types.is_union(kind):
        return False
    return all(is_divisible(kind.field(i).type) for i in range(kind.num_fields))


def merge(left: Any, right: Any) -> Any:
    """One value of what two leaves hold of it: structs are united, lists element by element."""
    if isinstance(left, dict) and isinstance(right, dict):
        both = {name: merge(left[name], right[name]) for name in left.keys() & right.keys()}
        return left | right | both
    if isinstance(left, list) and isinstance(right, list):
        return [merge(*pair) for pair in zip(left, right, strict=True)]
    return left


def make_room(held: OrderedDict[Any, pyarrow.ChunkedArray]) -> None:
    """Let go of the blocks used longest ago; the newest stays, whatever its size."""
    total = sum(array.get_total_buffer_size() for array in held.values())
    while total > HELD_BYTES and len(held) > 1:
        total -= held.popitem(last=False)[1].get_total_buffer_size()


def decode_levels(
    data: bytes, num_values: int, *, max_level: int = 1
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Repetition levels: runs of one value and groups of eight, mixed.

    Args:
        data: begins with the levels.
        max_level: of the column, at most 255; a level takes as many bits as this does.
    Returns:
        (num_values,) uint8.
    """
    reader, runs, found = Reader(data), [], 0
    length, num_bits = len(data), max_level.bit_length()
    while found < num_values and reader.position < length:
        head = reader.varint()
        if head & 1:
            packed = np.frombuffer(reader.take((head >> 1) * num_bits), dtype=np.uint8)
            bits = np.unpackbits(packed, bitorder="little").reshape(-1, num_bits)
            runs.append((bits << np.arange(num_bits, dtype=np.uint8)).sum(1, dtype=np.uint8))
        else:
            runs.append(np.full(head >> 1, reader.byte(), dtype=np.uint8))
        found += len(runs[-1])
    return np.concatenate(runs)[:num_values]
