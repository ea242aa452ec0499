"""Owns reading single byte arrays (texts, pictures) of a Parquet file without unpacking their page.

A writer that looks at a page's size once in 1,024 values puts as many pictures into each: megabytes
to be unpacked for one. So a page is unpacked once, to note where its values lie, and from then on a
value is read alone. Without compression it is a range of the file. Snappy's encoders pack 64 KiB at
a time, and nothing in such a piece refers to what is before it. That is a custom of theirs, not a
rule, so it is checked; then the pieces that hold a value are unpacked.

Source: https://github.com/google/snappy/blob/main/format_description.txt and
https://parquet.apache.org/docs/file-format/data-pages/encodings/
"""

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow

from dataset.records.nesting import Entry
from dataset.records.thrift import Reader, Struct, write_varint

PIECE_BYTES = 1 << 16
CODECS = ("UNCOMPRESSED", "SNAPPY")
PLAIN, DICTIONARY_ENCODINGS, RUN_LENGTH = 0, (2, 8), 3
DATA_PAGE_V2 = 3
LENGTH = struct.Struct("<I")
# Of an element of Snappy's, by its first byte: how many bytes it takes packed, and unpacked. The
# size of a long literal stands in so many bytes behind the first.
LONG_LITERALS = {tag: (tag >> 2) - 59 for tag in (60 << 2, 61 << 2, 62 << 2, 63 << 2)}
STEPS = [(2 + (tag >> 2), 2, 3, 5)[tag & 3] for tag in range(256)]
SIZES = [(tag >> 2 & 7) + 4 if tag & 3 == 1 else (tag >> 2) + 1 for tag in range(256)]

Numbers = np.ndarray[Any, np.dtype[np.uint32]]
Levels = Numbers | None  # None: all are the highest
Read = Callable[[int, int], bytes]  # from and to, in the file


@dataclass(frozen=True)
class RawPage:
    """A page's header, and from where to where what follows it lies in the file."""

    header: Struct
    start: int
    end: int


@dataclass(frozen=True)
class Values:
    """Byte arrays that were written plainly, one behind the other, in one page.

    Args:
        start: where the packed bytes begin in the file.
        offsets: (n + 1,) of the values among the unpacked bytes, each with its length before it.
        pieces: (p + 1,) of the pieces among the packed bytes; None: they are not packed.
    """

    start: int
    offsets: Numbers
    pieces: Numbers | None

    def get(self, number: int, *, read: Read) -> bytes:
        """A value of the file that `read` reads."""
        begin, end = int(self.offsets[number]) + LENGTH.size, int(self.offsets[number + 1])
        if self.pieces is None:
            return read(self.start + begin, self.start + end)
        first, last = begin // PIECE_BYTES, -(-end // PIECE_BYTES)
        if first >= last:
            return b""
        packed = read(self.start + int(self.pieces[first]), self.start + int(self.pieces[last]))
        size = min(last * PIECE_BYTES, int(self.offsets[-1])) - first * PIECE_BYTES
        data = unpack(write_varint(size) + packed, size)
        return data[begin - first * PIECE_BYTES : end - first * PIECE_BYTES]


@dataclass(frozen=True)
class BlockValues:
    """The entries of a leaf in rows that follow each other.

    Args:
        numbers: of each value, its place in `values`; None: in order.
        starts: (rows + 1,) of the rows among the entries; None: one each.
        max_definition: the level of an entry that has a value.
    """

    values: Values
    numbers: Numbers | None
    repetitions: Levels
    definitions: Levels
    places: Numbers | None  # of each entry, the number of values before it; None: each has one
    starts: Numbers | None
    max_definition: int

    def entries(self, row: int, *, read: Read, decode: Callable[[bytes], Any]) -> list[Entry]:
        """Those of a row; `decode` makes a value of bytes."""
        start, end = row, row + 1
        if self.starts is not None:
            start, end = int(self.starts[row]), int(self.starts[row + 1])
        return [self._entry(place, read, decode) for place in range(start, end)]

    def _entry(self, place: int, read: Read, decode: Callable[[bytes], Any]) -> Entry:
        repetition = 0 if self.repetitions is None else int(self.repetitions[place])
        definition = self.max_definition
        if self.definitions is not None:
            definition = int(self.definitions[place])
        if definition < self.max_definition:
            return Entry(repetition, definition, None)
        number = place if self.places is None else int(self.places[place])
        number = number if self.numbers is None else int(self.numbers[number])
        return Entry(repetition, definition, decode(self.values.get(number, read=read)))


def find_values(
    read: Read,
    pages: Sequence[RawPage],
    dictionary: RawPage | None,
    *,
    codec: str,
    max_levels: tuple[int, int],
) -> BlockValues | None:
    """Where the byte arrays of some pages lie; None where each cannot be read alone.

    Args:
        pages: data pages; several, if all refer to the dictionary.
        max_levels: of repetition and definition.
    Raises:
        IndexError, ValueError, OSError, pyarrow.ArrowException: a page is damaged.
    """
    if codec not in CODECS:
        return None
    parts = [read_part(read, page, codec=codec, max_levels=max_levels) for page in pages]
    values, numbers = _values_of(read, parts, dictionary, codec=codec)
    if values is None:
        return None
    repetitions, definitions = (
        np.concatenate([part.levels[i] for part in parts]) if most else None
        for i, most in enumerate(max_levels)
    )
    places = starts = None
    if definitions is not None and (definitions == max_levels[1]).all():
        definitions = None
    if definitions is not None:
        has_value = (definitions == max_levels[1]).astype(np.uint32)
        places = np.cumsum(has_value, dtype=np.uint32) - has_value
    if repetitions is not None:
        begins = np.flatnonzero(np.append(repetitions, 0) == 0)  # and where the last row ends
        starts = begins.astype(np.uint32)
    return BlockValues(values, numbers, repetitions, definitions, places, starts, max_levels[1])


@dataclass(frozen=True)
class Body:
    """What a page holds. packed: as in the file, from `start` on; data: unpacked, which may be the
    same."""

    start: int
    packed: bytes
    data: bytes


@dataclass(frozen=True)
class Part:
    """A data page: its levels, repetition and definition, each (n,) or empty; its values begin
    behind `skip` bytes."""

    body: Body
    skip: int
    encoding: int
    num_present: int
    levels: tuple[Numbers, Numbers]

    def numbers(self) -> Numbers:
        """The values' numbers in the dictionary."""
        num_bits = self.body.data[self.skip]
        return decode_runs(self.body.data[self.skip + 1 :], self.num_present, num_bits=num_bits)


def read_body(read: Read, page: RawPage, *, codec: str, skip: int = 0) -> Body:
    """A page's bytes behind the first `skip`, which are not packed."""
    start = page.start + skip
    packed = read(start, page.end)
    is_packed = codec != "UNCOMPRESSED"
    return Body(start, packed, unpack(packed, page.header[2][1] - skip) if is_packed else packed)


def read_part(read: Read, page: RawPage, *, codec: str, max_levels: tuple[int, int]) -> Part:
    """A data page of either version; raises as `find_values`."""
    is_second = page.header[1][1] == DATA_PAGE_V2
    about = page.header[8 if is_second else 5][1]
    num_entries, encoding = about[1][1], about[4 if is_second else 2][1]
    levels, skip = [], 0
    if is_second:
        sizes = about[6][1], about[5][1]
        is_packed = about[7][1] if 7 in about else True
        data = read(page.start, page.start + sum(sizes))
        body = read_body(read, page, codec=codec if is_packed else "UNCOMPRESSED", skip=sum(sizes))
        pieces = data[: sizes[0]], data[sizes[0] :]
    else:
        body, pieces = read_body(read, page, codec=codec), (b"", b"")
    for most, name, piece in zip(max_levels, (4, 3), pieces, strict=True):
        if most and not is_second:
            if about[name][1] != RUN_LENGTH:
                raise ValueError("levels of an encoding that is no longer in use")
            (size,) = LENGTH.unpack_from(body.data, skip)
            piece = body.data[skip + LENGTH.size : skip + LENGTH.size + size]
            skip += LENGTH.size + size
        empty = np.empty(0, np.uint32)
        bits = most.bit_length()
        levels.append(decode_runs(piece, num_entries, num_bits=bits) if most else empty)
    present = int((levels[1] == max_levels[1]).sum()) if max_levels[1] else num_entries
    return Part(body, skip, encoding, present, (levels[0], levels[1]))


def _values_of(
    read: Read, parts: Sequence[Part], dictionary: RawPage | None, *, codec: str
) -> tuple[Values | None, Numbers | None]:
    """The values of data pages and, where they are those of the dictionary, which."""
    parts = [part for part in parts if part.num_present]
    wanted = (PLAIN,) if dictionary is None else DICTIONARY_ENCODINGS
    if not parts:
        return Values(0, np.zeros(1, np.uint32), None), None
    if any(p.encoding not in wanted for p in parts) or (dictionary is None and len(parts) > 1):
        return None, None
    if dictionary is None:
        return _locate(parts[0].body, parts[0].num_present, skip=parts[0].skip), None
    body = read_body(read, dictionary, codec=codec)
    values = _locate(body, dictionary.header[7][1][1][1])
    numbers = np.concatenate([part.numbers() for part in parts])
    if values is not None and numbers.max() >= len(values.offsets) - 1:
        raise ValueError("a value is not in the dictionary")
    return values, numbers


def _locate(body: Body, num_values: int, *, skip: int = 0) -> Values | None:
    """Where values lie that were written plainly; None where Snappy's pieces depend on another."""
    pieces = None
    if body.data is not body.packed:
        pieces = snappy_pieces(body.packed)
        if pieces is None:
            return None
    offsets = np.fromiter(_walk(body.data, num_values, skip=skip), np.uint32, num_values + 1)
    return Values(body.start, offsets, pieces)


def _walk(data: bytes, num_values: int, *, skip: int) -> Iterator[int]:
    position = skip
    for _ in range(num_values):
        yield position
        position += LENGTH.size + LENGTH.unpack_from(data, position)[0]
    if position != len(data):
        raise ValueError("the values do not end where their page does")
    yield position


def snappy_pieces(packed: bytes) -> Numbers | None:
    """Where each 64 KiB of what Snappy packed begin, and where the last ends: (p + 1,); None where
    they cannot be unpacked alone."""
    reader = Reader(packed)
    length = reader.varint()
    position, end, done, limit = reader.position, len(packed), 0, PIECE_BYTES
    starts = [position]
    while position < end:
        tag = packed[position]
        if tag in LONG_LITERALS:
            width = LONG_LITERALS[tag]
            size = int.from_bytes(packed[position + 1 : position + 1 + width], "little") + 1
            position += 1 + width + size
            done += size
        else:
            position += STEPS[tag]
            done += SIZES[tag]
        if done >= limit:
            starts.append(position)
            limit += PIECE_BYTES
    if done % PIECE_BYTES:
        starts.append(end)
    for number, piece in enumerate(itertools.pairwise(starts)):
        size = min(PIECE_BYTES, length - number * PIECE_BYTES)
        try:
            unpack(write_varint(size) + packed[slice(*piece)], size)
        except OSError:  # pyarrow's: it refers to a piece before it, or is of another size
            return None
    return np.array(starts, dtype=np.uint32)


def unpack(packed: bytes, size: int) -> bytes:
    """What Snappy packed, of `size` bytes."""
    data: bytes = pyarrow.decompress(packed, size, "snappy", asbytes=True)
    return data


def decode_runs(data: bytes, num_values: int, *, num_bits: int) -> Numbers:
    """Levels, or numbers in a dictionary: runs of one value and groups of eight, mixed.

    Args:
        data: begins with them.
        num_bits: that a value takes, at most 32.
    Returns:
        (num_values,) uint32.
    Raises:
        IndexError: the data end too early.
    """
    reader, found = Reader(data), 0
    runs = [np.empty(0, np.uint32)]
    while found < num_values:
        head = reader.varint()
        if head & 1:
            packed = np.frombuffer(reader.take((head >> 1) * num_bits), dtype=np.uint8)
            bits = np.unpackbits(packed, bitorder="little").reshape(-1, max(num_bits, 1))
            powers = np.left_shift(1, np.arange(bits.shape[1], dtype=np.uint64))
            values = (bits * powers).sum(1).astype(np.uint32)
            runs.append(values if num_bits else np.zeros(8 * (head >> 1), np.uint32))
        else:
            value = int.from_bytes(reader.take(-(-num_bits // 8)), "little")
            runs.append(np.full(head >> 1, value, dtype=np.uint32))
        if not len(runs[-1]):
            raise ValueError("a run of no values")
        found += len(runs[-1])
    return np.concatenate(runs)[:num_values]
