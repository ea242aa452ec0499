"""Owns reading a request to `/v1/chat/completions`: from JSON to messages, images, sampling.

Source: https://platform.openai.com/docs/api-reference/chat/create
"""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling, cannot_think
from model.vision.pictures import picture_size
from model.vlm_processor import IMAGE_TAG, Message

MAX_IMAGES = 16
MAX_IMAGE_PIXELS = 50_000_000
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_MESSAGES = 1000
MAX_PARTS = 100  # of one message
MAX_VALUES = 500_000  # in the JSON: millions of empty arrays would take gigabytes
MAX_DIGITS = 400  # of an integer
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
USED = {
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed",
    "stop", "stream", "stream_options", "n", "top_k", "repetition_penalty", "chat_template_kwargs",
    "num_beams", "length_penalty",
}  # fmt: skip
# Accepted and ignored: HARMLESS fields. Those of NOT_OFFERED would change the answer: only their
# neutral values, listed here, are accepted. The protocol refuses all other names.
HARMLESS = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction",
    "reasoning_effort", "verbosity",
}  # fmt: skip
NOT_OFFERED = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "moderation": (), "web_search_options": (),
}  # fmt: skip


class ApiError(Exception):
    """An error as the protocol reports it: a status and a JSON body."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class ChatRequest:
    """A valid request; its pictures are not decoded yet."""

    messages: list[Message]
    images: list[bytes]
    sampling: Sampling
    stops: list[str]
    is_stream: bool
    with_usage: bool


def parse_request(
    body: bytes | bytearray,
    engine: VLMEngine,
    *,
    model_id: str,
    defaults: Sampling,
    check: Callable[[], None] = lambda: None,
) -> ChatRequest:
    """Check and parse a request's body: the cheap checks first, pictures last.

    Args:
        check: called before each message and picture; whatever it raises stops the work.
    Raises:
        ApiError: 400 for an invalid request, 404 for another model.
    """
    fields = _parse_json(body)
    _check_names(fields)
    name = _take(fields, "model", str, required=True)
    if name != model_id:
        raise ApiError(
            404,
            f"the model {name[:100]!r} does not exist; this server has {model_id!r}",
            param="model",
            code="model_not_found",
        )
    stops = _parse_stops(fields)
    is_stream = _take(fields, "stream", bool) or False
    options = _take(fields, "stream_options", dict)
    if options is not None and not is_stream:
        raise _bad("stream_options is only allowed when stream is true", "stream_options")
    with_usage = _take(options or {}, "include_usage", bool) or False
    sampling = _parse_sampling(fields, defaults, max_tokens=engine.max_tokens)
    open_thinking = _parse_thinking(fields, engine)
    if open_thinking is not None:
        sampling = replace(sampling, open_thinking=open_thinking)
    entries = _take(fields, "messages", list, required=True)
    messages, images = parse_messages(entries, engine, check=check)
    return ChatRequest(messages, images, sampling, stops, is_stream, with_usage)


def _bad(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def _parse_json(body: bytes | bytearray) -> dict[str, Any]:
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise _bad(f"the body holds more than {MAX_VALUES:,} values")
    try:
        fields = json.loads(
            body, parse_constant=_refuse, parse_int=_integer, object_pairs_hook=_object
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _bad(f"the body is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(fields, dict):
        raise _bad("the body must be a JSON object")
    return fields


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1:  # and a sign
        raise ValueError(f"an integer of {len(digits)} digits; at most {MAX_DIGITS} are taken")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the name {name[:50]!r} stands twice in one object")
        fields[name] = value
    return fields


def _check_names(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name in NOT_OFFERED:
            if value is not None and value not in NOT_OFFERED[name]:
                raise _bad(f"{name} is not supported by this server; leave it out", name)
        elif name not in USED | HARMLESS:
            raise _bad(f"unrecognized request argument: {name[:100]}", name[:100])


def _take(fields: dict[str, Any], name: str, kind: type, *, required: bool = False) -> Any:
    """A field of the right type, or None where it is absent or null."""
    value = fields.get(name)
    if value is None:
        if required:
            raise _bad(f"{name} is required", name)
        return None
    is_right = isinstance(value, (int, float) if kind is float else kind)
    if not is_right or (isinstance(value, bool) and kind is not bool):
        wanted = {
            str: "a string",
            list: "an array",
            dict: "an object",
            bool: "true or false",
            int: "an integer",
            float: "a number",
        }[kind]
        raise _bad(f"{name} must be {wanted}", name)
    try:
        return float(value) if kind is float else value
    except OverflowError:
        raise _bad(f"{name} is too large", name) from None


def _parse_sampling(fields: dict[str, Any], defaults: Sampling, *, max_tokens: int) -> Sampling:
    if _take(fields, "n", int) not in (None, 1):
        raise _bad("n must be 1: this server gives one choice a request", "n")
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    limit = _take(fields, name, int)
    if limit is not None and not 1 <= limit <= max_tokens:
        raise _bad(f"{name} must be at least 1 and at most {max_tokens}", name)
    temperature, top_p = (_take(fields, name, float) for name in ("temperature", "top_p"))
    seed = _take(fields, "seed", int)
    if temperature is not None and not 0 <= temperature <= 2:
        raise _bad("temperature must be from 0 to 2", "temperature")
    if top_p is not None and not 0 <= top_p <= 1:
        raise _bad("top_p must be from 0 to 1", "top_p")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise _bad("seed must be a 64-bit integer", "seed")
    num_beams = _take(fields, "num_beams", int)
    # What a request names counts before the other's default: beams do not go with a temperature.
    if temperature is None and num_beams is not None and num_beams > 1:
        temperature = 0.0
    elif temperature and num_beams is None:
        num_beams = 1
    chosen = {
        "max_new_tokens": limit,
        "temperature": temperature,
        "top_p": None if top_p is None else max(top_p, 1e-9),  # 0: the likeliest token alone
        "top_k": _take(fields, "top_k", int),
        "repetition_penalty": _take(fields, "repetition_penalty", float),
        "seed": None if seed is None else seed % 2**63,
        "num_beams": num_beams,
        "length_penalty": _take(fields, "length_penalty", float),
    }
    try:
        return replace(defaults, **{k: v for k, v in chosen.items() if v is not None})
    except ValueError as error:
        message = str(error).replace("--", "")
        raise _bad(message, message.split()[0]) from None


def _parse_thinking(fields: dict[str, Any], engine: VLMEngine) -> bool | None:
    """`open_thinking` of `chat_template_kwargs`, a field of vLLM's; None where it is not given."""
    options, where = _take(fields, "chat_template_kwargs", dict) or {}, "chat_template_kwargs"
    for name in options:
        if name != "open_thinking":
            raise _bad(f"{where}.{name[:100]} is not supported; only open_thinking is", where)
    value = options.get("open_thinking")
    if value is not None and not isinstance(value, bool):
        raise _bad(f"{where}.open_thinking must be true or false", where)
    if value and not engine.can_think:
        raise _bad(f"{where}.open_thinking: {cannot_think(engine.generation)}", where)
    return value


def _parse_stops(fields: dict[str, Any]) -> list[str]:
    stops = fields.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    is_right = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_right or not all(isinstance(stop, str) and stop for stop in stops):
        raise _bad(f"stop must be a non-empty string or up to {MAX_STOPS} of them", "stop")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise _bad(
            f"stop has {longest:,} characters; at most {MAX_STOP_CHARACTERS} are taken", "stop"
        )
    return stops


def parse_messages(
    entries: list[Any], engine: VLMEngine, *, check: Callable[[], None] = lambda: None
) -> tuple[list[Message], list[bytes]]:
    """The protocol's messages in the form that `VLMEngine` takes.

    Each picture and text of a question becomes a line, in their order, as in the training data. A
    text with its own `<image>` tags says itself where the pictures go.
    """
    if len(entries) > MAX_MESSAGES:
        raise _bad(f"{len(entries):,} messages; at most {MAX_MESSAGES:,} are taken", "messages")
    messages: list[Message] = []
    images: list[bytes] = []
    for i, entry in enumerate(entries):
        check()
        where = f"messages[{i}]"
        if not isinstance(entry, dict):
            raise _bad(f"{where} must be an object", where)
        role = entry.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise _bad(f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
        texts, urls = _parse_content(entry.get("content"), f"{where}.content", role)
        if role == "assistant":
            messages += engine.remember([], "\n".join(t for t in texts if t is not None))
            continue
        messages.append({"role": ROLES[role], "content": _question(texts, where)})
        if len(images) + len(urls) > MAX_IMAGES:
            num_images = len(images) + len(urls)
            raise _bad(f"{num_images} images; at most {MAX_IMAGES} are taken", "messages")
        for here, url in urls:
            check()
            images.append(_parse_image(url, here))
    if not messages or messages[-1]["role"] != "user":
        raise _bad("the last of messages must be from the user", "messages")
    try:
        engine.context.check_length(messages)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from None
    return messages, images


def _question(texts: list[str | None], where: str) -> str:
    """One message's text; None stands for a picture."""
    num_images = texts.count(None)
    words = "\n".join(text for text in texts if text is not None)
    num_tags = words.count(IMAGE_TAG)
    if num_tags == 0:
        return "\n".join(IMAGE_TAG if text is None else text for text in texts)
    if num_tags != num_images:
        raise _bad(f"{where}: {num_tags} {IMAGE_TAG} tag(s) but {num_images} image(s)", where)
    return ask(words, num_images=num_images)[0]["content"]


def _parse_content(
    content: Any, where: str, role: str
) -> tuple[list[str | None], list[tuple[str, Any]]]:
    """The parts' texts, None for a picture; and each picture's place in the JSON and its url."""
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list) or not content:
        raise _bad(f"{where} must be a string or a non-empty array of parts", where)
    if len(content) > MAX_PARTS:
        raise _bad(f"{where} has {len(content):,} parts; at most {MAX_PARTS} are taken", where)
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
            raise _bad(f"{here} must be a part of type {offered} that holds it", here)
    return texts, urls


def _parse_image(image_url: Any, where: str) -> bytes:
    """The bytes of a data URL, whose header is a picture's of an allowed size."""
    url = image_url.get("url") if isinstance(image_url, dict) else None
    if not isinstance(url, str):
        raise _bad(f"{where}.image_url must be an object with a url", where)
    head, comma, data = url.partition(",")
    if not comma or not (head.startswith("data:image/") and head.endswith(";base64")):
        raise _bad(
            f"{where}.image_url.url must be a data URL, data:image/...;base64,...; this server "
            "fetches nothing from elsewhere",
            where,
        )
    try:
        encoded = base64.b64decode(data, validate=True)
    except ValueError:  # also raised for characters beyond ASCII
        raise _bad(f"{where}.image_url.url is not valid base64", where) from None
    try:
        picture_size(encoded, max_pixels=MAX_IMAGE_PIXELS)  # nothing is decoded yet
    except ValueError as error:
        raise _bad(f"{where}.image_url.url is {error}", where) from None
    return encoded
