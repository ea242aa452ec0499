"""Owns reading and writing the compact Thrift encoding, in which Parquet keeps its headers.

A struct is `{field id: (type, value)}`, a list `(type of its elements, [values])`; what a field
means stands in Parquet's own description.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
INTEGERS = (I16, I32, I64)
Struct = dict[int, tuple[int, Any]]


class Reader:
    """Reads values one after another from bytes; `position` is where the next begins.

    Raises:
        IndexError: the bytes end too early. ValueError: they are not of this encoding.
    """

    def __init__(self, data: bytes, position: int = 0):
        self.data, self.position = data, position

    def byte(self) -> int:
        value = self.data[self.position]
        self.position += 1
        return value

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.data):
            raise IndexError(f"{length} bytes wanted at {self.position} of {len(self.data)}")
        value, self.position = self.data[self.position : end], end
        return value

    def varint(self) -> int:
        """An unsigned number, seven bits a byte."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def integer(self) -> int:
        """A signed number: 0, -1, 1, -2 are 0, 1, 2, 3."""
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.integer()
            kind = head & 0x0F
            value = kind == TRUE if kind in (TRUE, FALSE) else self.value(kind)
            fields[number] = (kind, value)
        return fields

    def value(self, kind: int) -> Any:
        if kind in INTEGERS:
            return self.integer()
        if kind in (TRUE, FALSE, BYTE):
            return self.byte()  # in a list, where a truth value takes a byte
        if kind == DOUBLE:
            return self.take(8)
        if kind == BINARY:
            return self.take(self.varint())
        if kind in (LIST, SET):
            head = self.byte()
            size = self.varint() if head >> 4 == 15 else head >> 4
            return head & 0x0F, [self.value(head & 0x0F) for _ in range(size)]
        if kind == STRUCT:
            return self.struct()
        raise ValueError(f"a value of type {kind}, which Parquet does not use")


def write_struct(fields: Struct) -> bytes:
    """The bytes of a struct, as `Reader.struct` reads it."""
    pieces, last = [], 0
    for number in sorted(fields):
        kind, value = fields[number]
        kind = (TRUE if value else FALSE) if kind in (TRUE, FALSE) else kind
        step = number - last
        pieces.append(bytes([step << 4 | kind]) if step < 16 else bytes([kind]) + _signed(number))
        if kind not in (TRUE, FALSE):
            pieces.append(_write(kind, value))
        last = number
    return b"".join((*pieces, b"\0"))


def _write(kind: int, value: Any) -> bytes:
    if kind in INTEGERS:
        return _signed(value)
    if kind in (TRUE, FALSE, BYTE):
        return bytes([value])
    if kind == BINARY:
        return write_varint(len(value)) + value
    if kind in (LIST, SET):
        inner, values = value
        size = len(values)
        head = (
            bytes([size << 4 | inner]) if size < 15 else bytes([0xF0 | inner]) + write_varint(size)
        )
        return head + b"".join(_write(inner, one) for one in values)
    assert kind in (DOUBLE, STRUCT)
    return value if kind == DOUBLE else write_struct(value)


def _signed(value: int) -> bytes:
    return write_varint(value << 1 if value >= 0 else (-value << 1) - 1)


def write_varint(value: int) -> bytes:
    """An unsigned number, as `Reader.varint` reads it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
