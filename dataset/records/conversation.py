"""Owns what a record must hold: a conversation with roles and text, and one `<image>` per image."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataset.records.stray_images import find_stray

IMAGE_TAG = "<image>"
# Role in the file -> ChatML's role. The first release's names are human and gpt.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# "role" and "content"; a first system message's "functions" become its "tools", a list of objects.
Message = dict[str, Any]
NO_IMAGES = {"system": "a system message", "assistant": "an answer"}


class BadRecordError(ValueError):
    """A record that cannot be used; the message begins with its file and line."""


@dataclass(frozen=True)
class Record:
    """One checked conversation.

    messages: `{"role", "content"}` each, in ChatML's roles, the first perhaps with "tools".
    images: names below the images path, or the encoded bytes themselves. where: file and line, for
    messages to the user. types: the kind of question of each answer, if the record gives it.
    carries_tools: whether a message in the file has "tools", which are not read.
    """

    messages: list[Message]
    images: Sequence[str | bytes]
    where: str
    types: tuple[str, ...] = ()
    carries_tools: bool = False


def check_conversation(raw: Any, *, where: str) -> list[Message]:
    """A conversation of either format (`role`, `content` or `from`, `value`) as messages.

    Other fields are dropped, but for the `functions` of a first system message.

    Raises:
        BadRecordError: not a list, an unknown role, text that is not a string, an image where none
            may be, functions that are not a list, no answer.
    """
    if not isinstance(raw, list) or not raw:
        raise BadRecordError(f"{where}: 'conversations' must be a list of at least one message")
    messages = []
    for turn, message in enumerate(raw, 1):
        if not isinstance(message, dict):
            raise BadRecordError(f"{where}: message {turn} is not an object with role and content")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecordError(
                f"{where}: message {turn} has role {role!r}; allowed are {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            hint = ", but a list: write it as text and name the pictures in 'image'"
            raise BadRecordError(
                f"{where}: message {turn} has no text in 'content' (or 'value')"
                f"{hint if isinstance(content, list) else ''}"
            )
        role = ROLES[role]
        if role == "system" and turn > 1:
            raise BadRecordError(f"{where}: message {turn} is a system message; it must be first")
        if role in NO_IMAGES and IMAGE_TAG in content:
            raise BadRecordError(
                f"{where}: message {turn}, {NO_IMAGES[role]}, holds {IMAGE_TAG}; an image belongs "
                "into a question"
            )
        tools = _read_tools(message.get("functions"), where=where) if role == "system" else []
        messages.append({"role": role, "content": content} | ({"tools": tools} if tools else {}))
    if all(m["role"] != "assistant" for m in messages):
        raise BadRecordError(f"{where}: no assistant message, so nothing to learn from")
    return messages


def _read_tools(functions: Any, *, where: str) -> list[dict[str, Any]]:
    """The tools in a system message's `functions`: a list of objects, or its JSON text."""
    if isinstance(functions, str) and functions.strip():
        functions = parse_json(functions, where=f"{where}: message 1: functions")
    if functions in (None, "") or isinstance(functions, str) and not functions.strip():
        return []
    if not isinstance(functions, list) or not all(isinstance(one, dict) for one in functions):
        raise BadRecordError(
            f"{where}: message 1 has 'functions' that are not a list of JSON objects; mend or "
            "delete them"
        )
    return functions


def carries_tools(turns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any message, as it stands in the file, has `tools`. They are not read, but no system
    message of ours is put before them."""
    return any(turn.get("tools") for turn in turns)


def decode(line: bytes, *, where: str) -> str:
    """A line as text, without a byte order mark; raises `BadRecordError` where it is not UTF-8."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from None


def parse_json(text: str, *, where: str) -> Any:
    """The value of a JSON text; raises `BadRecordError`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"{where}: not valid JSON ({error}); mend or delete it") from None


def check_stray(
    fields: Mapping[str, Any],
    turns: Sequence[Mapping[str, Any]],
    images: Sequence[str | bytes],
    *,
    read: str,
    where: str,
) -> None:
    """Raise `BadRecordError` if the record has a picture in a field that is not read.

    A record with `images` may name them in other fields too, by URL for instance; then only tags
    of other projects are refused.

    Args:
        fields: those of the record that are not read.
        turns: its messages as they stand in the file.
        images: those found in the field `read`.
        read: name of the field that images are read from.
    """
    stray = find_stray({} if images else fields, turns, image_tag=IMAGE_TAG)
    if stray:
        raise BadRecordError(
            f"{where}: {stray}; put pictures into {read!r}, with {IMAGE_TAG} where each belongs"
        )


def count_tags(messages: Sequence[Message]) -> int:
    """Number of `<image>` tags in a conversation."""
    return sum(m["content"].count(IMAGE_TAG) for m in messages)


def check_tags(messages: Sequence[Message], images: Sequence[str | bytes], *, where: str) -> None:
    """Raise `BadRecordError` unless there is exactly one `<image>` tag per image."""
    num_tags = count_tags(messages)
    if num_tags != len(images):
        names = ", ".join(
            shorten(image) if isinstance(image, str) else f"{len(image)} bytes"
            for image in images[:3]
        )
        raise BadRecordError(
            f"{where}: {num_tags} {IMAGE_TAG} tag(s) but {len(images)} image(s) [{names}]; "
            "give every tag exactly one image"
        )


def shorten(name: str, *, limit: int = 80) -> str:
    """A name in quotes, cut where it is too long to read."""
    return repr(name if len(name) <= limit else name[:limit] + "...")
