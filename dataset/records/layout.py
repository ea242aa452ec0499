"""Owns where records keep conversation and pictures: every layout that can be read.

- `conversations` or `messages`: turns of `role` and `content` or of `from` and `value`; in a column
  also their JSON text. A content may be a list of typed parts, as TRL and ms-swift write it:
  `{"type": "text", "text"}` and `{"type": "image"}`, with or without the picture in it.
- `image`, `images` or `image_bytes`: one picture or a list of them, each encoded bytes, the name of
  a file, `data:image/png;base64,...`, or `{"bytes", "path"}` as `datasets` writes its `Image`.
"""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dataset.records.conversation import (
    IMAGE_TAG,
    BadRecordError,
    Message,
    check_tags,
    count_tags,
    parse_json,
    shorten,
)
from dataset.records.images import check_size

LAYOUTS = (
    "JSON lines, a JSON array or Parquet with 'conversations' or 'messages' and 'image', 'images' "
    "or 'image_bytes'; a folder of datasets.save_to_disk; WebDataset tars with a .json beside the "
    "pictures of each sample; a folder or pattern of such files"
)
TURN_FIELDS = ("conversations", "messages")
PICTURE_KEYS = ("image", "image_url", "path", "url", "bytes")  # of a typed part, the first counts
DATA_URL = re.compile(r"\s*data:image/[\w.+-]+;base64,", re.IGNORECASE)
NOTHING: tuple[Any, ...] = (None, "", b"")


def find_turns(raw: Mapping[str, Any], *, where: str) -> tuple[str, Any]:
    """Name and value of the field that holds the conversation; a text is read as JSON."""
    for name in TURN_FIELDS:
        if (value := raw.get(name)) is not None:
            return name, value
    found = ", ".join(map(repr, list(raw)[:12])) or "none"
    raise BadRecordError(
        f"{where}: no conversation in 'conversations' or 'messages'; its fields: {found}"
    )


def read_json_turns(value: Any, *, name: str, where: str) -> Any:
    """The turns of a column, which may hold them as JSON text."""
    return parse_json(value, where=f"{where}: {name}") if isinstance(value, str) else value


def join_parts(turns: Any, *, where: str) -> tuple[Any, list[Any]]:
    """Turns whose contents are text, with a tag for each typed part that is a picture, and the
    pictures that stand in the parts themselves."""
    pictures: list[Any] = []
    if not isinstance(turns, list):
        return turns, pictures
    joined = []
    for number, turn in enumerate(turns, 1):
        name = "content" if isinstance(turn, dict) and "content" in turn else "value"
        if isinstance(turn, dict) and isinstance(turn.get(name), list):
            text = ""
            for part in turn[name]:
                piece, picture = _read_part(part, where=f"{where}: message {number}")
                pictures += [] if picture is None else [picture]
                text = _put_together(text, piece)
            turn = turn | {name: text}
        joined.append(turn)
    return joined, pictures


def _read_part(part: Any, *, where: str) -> tuple[str, Any]:
    """The text of a typed part, and its picture if it is one and brings it along."""
    if isinstance(part, str):
        return part, None
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], None
    if kind in ("image", "image_url"):
        value = next((part[k] for k in PICTURE_KEYS if part.get(k) not in NOTHING), None)
        if isinstance(value, dict) and isinstance(value.get("url"), str):
            value = value["url"]
        return IMAGE_TAG, value
    raise BadRecordError(
        f"{where} has a part of type {kind!r}, but parts may be 'text' with its text and 'image'"
    )


def _put_together(text: str, piece: str) -> str:
    """Two parts as they stand, but a line break between a picture and a word next to it."""
    is_before = piece == IMAGE_TAG and text[-1:].isalnum()
    is_behind = text.endswith(IMAGE_TAG) and piece[:1].isalnum()
    return f"{text}\n{piece}" if is_before or is_behind else text + piece


def find_pictures(raw: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, Any]:
    """Name and value of the first field that is not empty; the first field's name if all are."""
    for name in fields:
        value = raw.get(name)
        if value not in NOTHING and value != []:
            return name, value
    return fields[0], None


def split_names(text: str, exists: Callable[[str], bool]) -> list[str]:
    """One name, or names joined by commas; `exists` tells of a name that has commas in it."""
    if "," not in text or DATA_URL.match(text) or exists(text):
        return [text.strip()]
    return [name.strip() for name in text.split(",") if name.strip()]


def list_pictures(value: Any, *, name: str, where: str) -> list[str | bytes]:
    """The pictures of a field: names and encoded bytes.

    Raises:
        BadRecordError: something else, or one of several is empty.
    """
    values = value if isinstance(value, list) else [value]
    pictures = [_one_picture(one, where=where) for one in values]
    if all(picture in NOTHING for picture in pictures):
        return []
    for number, picture in enumerate(pictures, 1):
        if picture is False or picture in NOTHING:
            what = "is empty" if picture is not False else "is neither"
            raise BadRecordError(
                f"{where}: {name!r} must be a file name or several joined by commas, encoded "
                f"bytes (binary), or a list of them; number {number} {what}"
            )
    return pictures


def _one_picture(value: Any, *, where: str) -> Any:
    """Bytes or a name; None for nothing, False for what is neither."""
    if isinstance(value, dict):
        kept = [value.get(key) for key in ("bytes", "path")]
        value = next((one for one in kept if one not in NOTHING), None)
    if isinstance(value, str) and (match := DATA_URL.match(value)):
        try:
            check_size(len(value) * 3 // 4, name=match[0])
            return base64.b64decode(value[match.end() :], validate=True)
        except ValueError as error:
            raise BadRecordError(
                f"{where}: image {shorten(value, limit=40)} cannot be read ({error})"
            ) from None
    return value if value is None or isinstance(value, str | bytes) else False


def read_types(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The types of a record's answers, as the field `types` has them; () where it is no list of
    texts."""
    types: Any = raw.get("types")
    has_types = isinstance(types, list) and all(isinstance(one, str) for one in types)
    return tuple(types) if has_types else ()


def match_tags(
    messages: list[Message], images: Sequence[str | bytes], *, fix: bool, where: str
) -> list[Message]:
    """The messages with a tag for each image; raises `BadRecordError`.

    Args:
        fix: drop surplus tags.
    """
    has_surplus = 0 < len(images) < count_tags(messages)
    if has_surplus and fix:
        messages = drop_surplus_tags(messages, num_images=len(images))
    try:
        check_tags(messages, images, where=where)
    except BadRecordError as error:
        way_out = " (--fix_image_count 1 drops the surplus tags)" if has_surplus else ""
        raise BadRecordError(f"{error}{way_out}") from None
    return messages


def drop_surplus_tags(messages: Sequence[Message], *, num_images: int) -> list[Message]:
    """The messages with their first `num_images` tags: later ones are dropped, with their line
    where they have one to themselves."""
    left, kept = num_images, []
    for message in messages:
        before, *pieces = message["content"].split(IMAGE_TAG)
        text = before
        for piece in pieces:
            if left:
                text, left = text + IMAGE_TAG + piece, left - 1
            else:
                has_line = (not text or text.endswith("\n")) and piece.startswith("\n")
                text += piece[1:] if has_line else piece
        kept.append(message | {"content": text.rstrip("\n") if pieces else text})
    return kept
