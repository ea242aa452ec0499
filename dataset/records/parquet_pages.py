"""Owns random access to the rows of a Parquet file, in a memory that does not grow with the file.

A file's row groups may be of many gigabytes, but each column of one is cut into pages (a megabyte
in most files) that can be unpacked alone. Their headers say where they lie:

1. A column of structs is several columns of values ("leaves" here), each with pages of its own.
2. The headers of a leaf in a row group are read once, when the first row of the group is asked for,
   and mostly without what follows them: a list of `Block`s.
3. To read a row, its block is made a little Parquet file in memory: the block's pages behind the
   dictionary they need, and a footer that names them alone. pyarrow reads that.
4. The blocks of a leaf read last are kept, up to `HELD_BYTES`, which files read together share.
5. Of large blocks of texts and pictures only the value asked for is unpacked, where that can
   be done: see `page_values`.

Pages that refer to a dictionary are one block, since reading any of them unpacks the dictionary.

Source: https://parquet.apache.org/docs/file-format/ and parquet.thrift (the numbers of fields).
"""

import contextlib
import itertools
import os
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dataset.records.nesting import (
    Chain,
    assemble,
    chains_of,
    is_bytes,
    is_divisible,
    is_list,
    is_text,
    max_levels,
    merge,
)
from dataset.records.page_blocks import Block, Page, blocks_of
from dataset.records.page_values import (
    CODECS,
    DATA_PAGE_V2,
    DICTIONARY_ENCODINGS,
    RUN_LENGTH,
    BlockValues,
    RawPage,
    decode_runs,
    find_values,
)
from dataset.records.thrift import I64, LIST, STRUCT, Reader, Struct, write_struct

HELD_BYTES = 1 << 25  # of a leaf's unpacked blocks, in each process
LARGE_BYTES = 1 << 17  # a smaller block is unpacked whole
MAX_LOCATED = 1 << 14  # blocks whose values were found, in each process
HEADER_BYTES = 1 << 12  # read for a page's header at first; statistics in it may take more
MAGIC = b"PAR1"
DATA_PAGE, DICTIONARY_PAGE = 0, 2
WHOLE = -1  # in place of a leaf: a column that is read by row groups


@dataclass
class Held:
    """What is kept of files that are read together, the one used longest ago first. None of it
    travels to another process.

    unpacked: blocks by leaf, then by file, row group and number. located: by file, leaf, row group
    and number, where the values of a block lie; None where it is unpacked whole.
    """

    unpacked: dict[str, OrderedDict[tuple[Path, int, int], pyarrow.ChunkedArray]] = field(
        default_factory=dict
    )
    located: OrderedDict[tuple[Path, int, int, int], BlockValues | None] = field(
        default_factory=OrderedDict
    )

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
        self._chains: dict[int, Chain] = {}  # of the leaves whose values may be read alone
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
        block = blocks[number]
        try:
            located = self._locate(leaf, number, block)
            if located is not None:
                return self._value_alone(leaf, located, row - block.first_row)
            held = self._held.unpacked.setdefault(self._path_of(leaf, name), OrderedDict())
            key = (self.path, group, number)
            if key not in held:
                held[key] = self._unpack(name, block, leaf)
                make_room(held)
        except (pyarrow.ArrowException, OSError) as error:
            first_line = str(error).partition("\n")[0]
            raise ValueError(f"column {name!r} cannot be read ({first_line})") from None
        held.move_to_end(key)
        return held[key][row - block.first_row].as_py()

    def _value_alone(self, leaf: int, located: BlockValues, row: int) -> Any:
        chain = self._chains[leaf]
        decode = bytes.decode if is_text(chain[-1].type) else bytes
        return assemble(chain, located.entries(row, read=self._read, decode=decode))

    def _locate(self, leaf: int, number: int, block: Block) -> BlockValues | None:
        """Where the values of a block lie; None where it is unpacked whole."""
        if leaf not in self._chains or block.num_bytes < LARGE_BYTES:
            return None
        located, key = self._held.located, (self.path, leaf, block.group, number)
        if key not in located:
            try:
                located[key] = self._find_values(leaf, block)
            except (LookupError, ValueError, OSError, struct.error, pyarrow.ArrowException):
                located[key] = None  # pyarrow says what is wrong with it
            if len(located) > MAX_LOCATED:
                located.popitem(last=False)
        located.move_to_end(key)
        return located[key]

    def _find_values(self, leaf: int, block: Block) -> BlockValues | None:
        pages, start = [], block.start
        while start < block.end:
            pages.append(self._raw_page(start))
            start = pages[-1].end
        return find_values(
            self._read,
            pages,
            self._raw_page(block.dictionary[0]) if block.dictionary else None,
            codec=self._whole.metadata.row_group(block.group).column(leaf).compression,
            max_levels=max_levels(self._chains[leaf]),
        )

    def _raw_page(self, start: int) -> RawPage:
        header, body = self._page_header(start)
        return RawPage(header, body, body + header[3][1])

    def dictionary_sizes(self, name: str) -> list[int]:
        """Sizes, in the file, of the column's dictionaries that must be unpacked whole."""
        sizes = []
        for group in range(self._whole.num_row_groups):
            for leaf in self._leaves[name]:
                chunk = self._whole.metadata.row_group(group).column(max(leaf, 0))
                is_whole = leaf not in self._chains or chunk.compression not in CODECS
                has_one = chunk.has_dictionary_page and chunk.dictionary_page_offset
                if leaf != WHOLE and has_one and is_whole:
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
        if not below or not is_divisible(field.type):
            return [WHOLE]
        chains = chains_of(field)
        if len(chains) == len(below):
            pairs = zip(below, chains, strict=True)
            self._chains |= {leaf: chain for leaf, chain in pairs if self._is_known(leaf, chain)}
        return below

    def _is_known(self, leaf: int, chain: Chain) -> bool:
        """Whether a leaf's values are byte arrays, in lists and structs alone."""
        column = self._whole.schema.column(leaf)
        levels = column.max_repetition_level, column.max_definition_level
        is_nested = all(is_list(f.type) or pyarrow.types.is_struct(f.type) for f in chain[:-1])
        is_taken = column.physical_type == "BYTE_ARRAY" and is_bytes(chain[-1].type)
        return is_nested and is_taken and max_levels(chain) == levels

    def _path_of(self, leaf: int, name: str) -> str:
        return name if leaf == WHOLE else str(self._whole.schema.column(leaf).path)

    def _find_blocks(self, leaf: int, group: int) -> Iterator[Block]:
        if leaf == WHOLE:
            yield Block(0, self._whole.metadata.row_group(group).num_rows, group)
        else:
            dictionary, pages = self._pages(group, leaf)
            num_rows = self._whole.metadata.row_group(group).num_rows
            yield from blocks_of(pages, dictionary, group=group, num_rows=num_rows)

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
        num_bits = self._whole.schema.column(leaf).max_repetition_level.bit_length()
        levels = decode_runs(data[4:], num_values, num_bits=num_bits)
        return int((levels == 0).sum()), bool(levels[:1].any())

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
        for number in (10, 11, 12, 13, 14, 15, 16):  # offsets of what is left out; statistics
            about.pop(number, None)
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


def make_room(held: OrderedDict[Any, pyarrow.ChunkedArray]) -> None:
    """Let go of the blocks used longest ago; the newest stays, whatever its size."""
    total = sum(array.get_total_buffer_size() for array in held.values())
    while total > HELD_BYTES and len(held) > 1:
        total -= held.popitem(last=False)[1].get_total_buffer_size()
