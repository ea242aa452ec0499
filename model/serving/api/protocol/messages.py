"""Owns reading the messages of a chat: texts and pictures, in the form that `VLMEngine` takes."""

import base64
from collections.abc import Callable
from typing import Any

from model.generation.engine import VLMEngine, ask
from model.serving.api.protocol.fields import ApiError, bad
from model.vision.pictures import picture_size
from model.vlm_processor import IMAGE_TAG, Message

MAX_IMAGES = 16
MAX_IMAGE_PIXELS = 50_000_000
MAX_MESSAGES = 1000
MAX_PARTS = 100  # of one message
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def parse_messages(
    entries: list[Any], engine: VLMEngine, *, check: Callable[[], None] = lambda: None
) -> tuple[list[Message], list[bytes]]:
    """The protocol's messages, and the pictures' bytes.

    Each picture and text of a question becomes a line, in their order, as in the training data. A
    text with its own `<image>` tags says itself where the pictures go. A last message of the
    assistant is the beginning of its answer.
    """
    if len(entries) > MAX_MESSAGES:
        raise bad(f"{len(entries):,} messages; at most {MAX_MESSAGES:,} are taken", "messages")
    messages: list[Message] = []
    images: list[bytes] = []
    for i, entry in enumerate(entries):
        check()
        where = f"messages[{i}]"
        if not isinstance(entry, dict):
            raise bad(f"{where} must be an object", where)
        role = entry.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise bad(f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
        texts, urls = _parse_content(entry.get("content"), f"{where}.content", role)
        if role == "assistant":
            messages += engine.remember([], "\n".join(t for t in texts if t is not None))
            continue
        messages.append({"role": ROLES[role], "content": _question(texts, where)})
        if len(images) + len(urls) > MAX_IMAGES:
            num_images = len(images) + len(urls)
            raise bad(f"{num_images} images; at most {MAX_IMAGES} are taken", "messages")
        for here, url in urls:
            check()
            images.append(_parse_image(url, here))
    _check_end(messages)
    try:
        engine.context.check_length(messages)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from None
    return messages, images


def _check_end(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages[-2:]]
    if not roles or roles[-1] == "system" or roles == ["assistant"]:
        raise bad(
            "the last of messages must be from the user, or the beginning of the assistant's "
            "answer to it",
            "messages",
        )


def _question(texts: list[str | None], where: str) -> str:
    """One message's text; None stands for a picture."""
    num_images = texts.count(None)
    words = "\n".join(text for text in texts if text is not None)
    num_tags = words.count(IMAGE_TAG)
    if num_tags == 0:
        return "\n".join(IMAGE_TAG if text is None else text for text in texts)
    if num_tags != num_images:
        raise bad(f"{where}: {num_tags} {IMAGE_TAG} tag(s) but {num_images} image(s)", where)
    return ask(words, num_images=num_images)[0]["content"]


def _parse_content(
    content: Any, where: str, role: str
) -> tuple[list[str | None], list[tuple[str, Any]]]:
    """The parts' texts, None for a picture; and each picture's place in the JSON and its url."""
    if content is None and role == "assistant":  # as in an answer that was a call of a tool
        return [""], []
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list) or not content:
        raise bad(f"{where} must be a string or a non-empty array of parts", where)
    if len(content) > MAX_PARTS:
        raise bad(f"{where} has {len(content):,} parts; at most {MAX_PARTS} are taken", where)
    texts: list[str | None] = []
    urls: list[tuple[str, Any]] = []
    for i, part in enumerate(content):
        here = f"{where}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and role == "user":
            texts.append(None)
            urls.append((here, part.get("image_url")))
        else:
            offered = "text or image_url" if role == "user" else "text"
            raise bad(f"{here} must be a part of type {offered} that holds it", here)
    return texts, urls


def _parse_image(image_url: Any, where: str) -> bytes:
    """The bytes of a data URL, whose header is a picture's of an allowed size."""
    url = image_url.get("url") if isinstance(image_url, dict) else image_url
    if not isinstance(url, str):
        raise bad(f"{where}.image_url must be a data URL, or an object with it as url", where)
    head, comma, data = url.partition(",")
    if not comma or not (head.startswith("data:image/") and head.endswith(";base64")):
        raise bad(
            f"{where}.image_url.url must be a data URL, data:image/...;base64,...; this server "
            "fetches nothing from elsewhere",
            where,
        )
    try:
        data = "".join(data.split())  # some encoders break lines, some leave the padding out
        encoded = base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except ValueError:  # also raised for characters beyond ASCII
        raise bad(f"{where}.image_url.url is not valid base64", where) from None
    try:
        picture_size(encoded, max_pixels=MAX_IMAGE_PIXELS)  # nothing is decoded yet
    except ValueError as error:
        raise bad(f"{where}.image_url.url is {error}", where) from None
    return encoded
