"""Owns finding pictures of a record in fields that are not read.

Other projects use other fields for a record's pictures, and other tags for their places. Such a
record would pass as one without pictures, and its answers would be learnt without them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

TURN_FIELDS = {"role", "content", "from", "value"}
# Of tools and of thinking: text about pictures at most. Only `functions` is read.
TEXT_FIELDS = {"functions", "tools", "tool_calls", "reasoning_content"}
SUFFIXES = "jpe?g|jfif|png|webp|gif|bmp|tiff?|heic|heif|avif"
PICTURE_NAME = re.compile(rf"data:image/.*|[^\n]*\.(?:{SUFFIXES})(?:[?#]\S*)?\s*", re.I | re.S)
PICTURE_FIELD = re.compile(
    r"(?:image|img|picture|photo|pixel)s?"
    r"(?:_?(?:path|file|filename|name|url|byte|base64|b64|list|data|value)s?)?",
    re.IGNORECASE,
)
NOT_PICTURES = {"id", "source"}  # may be named after the file that a text was made from
LONGEST_NAME = 4096
MAX_DEPTH = 4
# Other projects' image tags: <img>, <Image>, <|image|>, <image_1>, <|image_pad|>. HTML's
# own <img src="..."> has attributes.
FOREIGN_TAG = re.compile(
    r"<\|?(?:img|images?|imagehere|im_patch|image_placeholder|image_pad|image_token|image_start"
    r"|image_soft_token|start_of_image|vision_start)[ _:-]?\d*\|?\s?/?>",
    re.IGNORECASE,
)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def find_stray(
    fields: Mapping[str, Any], turns: Sequence[Mapping[str, Any]], *, image_tag: str
) -> str | None:
    """The sign, in words, that a record has a picture which is not read; None if there is none.

    Args:
        fields: those of a record that are not read; {} if its own image field has images.
        turns: its messages as they stand in the file.
        image_tag: the tag that is read.
    """
    for name, value in fields.items():
        if holds_pictures(name, value):
            return f"its pictures stand in {name[:40]!r}, which is not read"
    for number, turn in enumerate(turns, 1):
        for name in turn.keys() - TURN_FIELDS - TEXT_FIELDS:
            if holds_pictures(name, turn[name]):
                return f"message {number} has pictures in {name[:40]!r}, which is not read"
        tag = _foreign_tag(turn, image_tag)
        if tag:
            return f"message {number} holds {tag!r}, which is read as words"
    return None


def holds_pictures(name: str, value: Any) -> bool:
    """Whether a field that is not read holds pictures or names them, by its name or value."""
    if name in NOT_PICTURES:
        return False
    return _is_picture(value, is_named=PICTURE_FIELD.fullmatch(name) is not None)


def _is_picture(value: Any, *, is_named: bool, depth: int = 0) -> bool:
    """Bytes, the name of a picture's file or, in a field that is named for pictures, any words."""
    if isinstance(value, bytes):
        return len(value) > 0
    if isinstance(value, str):
        is_name = len(value) <= LONGEST_NAME or value.startswith("data:image/")
        return bool(value) and (is_named or is_name and bool(PICTURE_NAME.fullmatch(value)))
    if depth == MAX_DEPTH or not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return any(_is_picture(one, is_named=is_named, depth=depth + 1) for one in inner)


def _foreign_tag(turn: Mapping[str, Any], image_tag: str) -> str | None:
    """Another project's image tag in a question; answers and code may contain such tags as text."""
    role: Any = turn.get("role", turn.get("from"))
    text: Any = turn.get("content", turn.get("value"))
    if role in ("assistant", "gpt") or "<" not in text:
        return None
    tags = (found[0] for found in FOREIGN_TAG.finditer(CODE.sub("", text)))
    return next((tag for tag in tags if tag != image_tag), None)
