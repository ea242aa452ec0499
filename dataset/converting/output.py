"""Owns writing records: JSON lines with their pictures in a zip or a folder, or Parquet.

The bytes depend on the records alone. A picture is named after its content, so that one that many
records have is written once, and no name of a source leads anywhere.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dataset.records.conversation import Record

SUFFIXES = {  # first bytes of a picture's file -> how its name ends
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"GIF8": ".gif",
    b"BM": ".bmp",
}
GROUP_BYTES = 1 << 26  # of a Parquet file's row group, about

StorePicture = Callable[[str, bytes], None]  # takes a name, each once, and the picture's bytes


@dataclass(frozen=True)
class PlainRecord:
    """A record to write: messages with role and content, encoded pictures, types of the answers."""

    messages: list[dict[str, Any]]
    images: list[bytes]
    types: tuple[str, ...] = ()


def plain_record(record: Record, images: list[bytes]) -> PlainRecord:
    """A record as it was read, to be written again; tools of its system message stay."""
    return PlainRecord(plain_messages(record.messages), images, record.types)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A reader's messages as files have them: tools are in the field `functions`."""
    plain = []
    for message in messages:
        fields = {"role": message["role"], "content": message["content"]}
        if message.get("tools"):
            fields["functions"] = message["tools"]
        plain.append(fields)
    return plain


def image_name(content: bytes) -> str:
    """The name of a picture's file."""
    suffix = next((end for head, end in SUFFIXES.items() if content.startswith(head)), ".tif")
    return hashlib.blake2b(content, digest_size=10).hexdigest() + suffix


def json_lines(records: Iterable[PlainRecord], store: StorePicture) -> Iterator[bytes]:
    """The records as lines, each picture stored when it is first met."""
    stored: set[bytes] = set()
    for record in records:
        names = [image_name(content) for content in record.images]
        for name, content in zip(names, record.images, strict=True):
            key = bytes.fromhex(name.partition(".")[0])  # less than half of what the name takes
            if key not in stored:
                stored.add(key)
                store(name, content)
        fields: dict[str, Any] = {"conversations": record.messages}
        if names:
            fields["image"] = ", ".join(names)
        if record.types:
            fields["types"] = list(record.types)
        yield json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def into_folder(folder: Path) -> StorePicture:
    """Stores pictures as files."""

    def store(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)

    return store


def write_parquet(file: IO[bytes], records: Iterable[PlainRecord]) -> None:
    """Write columns `conversations` (JSON) and `image_bytes` (a list), in the published layout, and
    `types` (a list, empty for a record without)."""
    import pyarrow  # slow to import
    import pyarrow.parquet

    schema = pyarrow.schema(
        {
            "conversations": pyarrow.string(),
            "image_bytes": pyarrow.list_(pyarrow.binary()),
            "types": pyarrow.list_(pyarrow.string()),
        }
    )
    rows: list[dict[str, Any]] = []
    size = 0
    # Without a dictionary any row can be read alone.
    with pyarrow.parquet.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for record in records:
            text = json.dumps(record.messages, ensure_ascii=False)
            text = text.encode("utf-8", "backslashreplace").decode()
            types = list(record.types)
            rows.append({"conversations": text, "image_bytes": record.images, "types": types})
            size += len(text) + sum(map(len, record.images))
            if size >= GROUP_BYTES:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
