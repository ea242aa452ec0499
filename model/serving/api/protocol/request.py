"""Owns reading a request to `/v1/chat/completions` or `/v1/completions`, the cheap checks first.

Source: https://platform.openai.com/docs/api-reference/chat/create and completions/create; fields
beyond them are those of vLLM, and `repeat_penalty` of llama.cpp.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling, cannot_think
from model.serving.api.protocol.fields import ApiError, bad, is_integer, parse_json, take
from model.serving.api.protocol.messages import parse_messages
from model.serving.api.protocol.settings import (
    MAX_CHOICES,
    NAMES,
    changed,
    check_names,
    check_told,
    parse_chat_logprobs,
    parse_num_choices,
    parse_sampling,
    parse_stops,
    parse_stream,
    parse_text_logprobs,
)
from model.vlm_processor import Message

CHAT = NAMES | {
    "model", "messages", "max_completion_tokens", "chat_template_kwargs", "top_logprobs",
    "add_generation_prompt", "continue_final_message",
}  # fmt: skip
TEXT = NAMES | {"model", "prompt", "best_of"}
HARMLESS = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction",
    "reasoning_effort", "verbosity",
}  # fmt: skip
NEUTRAL = {"logit_bias": ({},), "echo": (False,)}
CHAT_NEUTRAL = NEUTRAL | {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "moderation": (), "web_search_options": (),
}  # fmt: skip
TEXT_NEUTRAL = NEUTRAL | {"suffix": ("",)}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a valid request asks for, beside its prompts.

    Args:
        num_choices: answers to each prompt.
    """

    sampling: Sampling
    stops: list[str]
    num_choices: int
    is_stream: bool
    with_usage: bool

    @property
    def is_large(self) -> bool:
        """Whether it computes as much as many answers."""
        return self.sampling.num_beams > 1 or self.num_choices > 1


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Request):
    """A question with its history; its pictures are not decoded yet."""

    messages: list[Message]
    images: list[bytes]


@dataclass(frozen=True, kw_only=True)
class TextRequest(Request):
    """Prompts as they stand, as texts or ids."""

    prompts: list[str | list[int]]

    @property
    def is_large(self) -> bool:
        return super().is_large or len(self.prompts) > 1


@dataclass(frozen=True)
class Asked:
    """Whom requests ask.

    Args:
        names: that the model answers to; the first is its own.
        defaults: settings that a request does not name.
    """

    engine: VLMEngine
    names: Collection[str]
    defaults: Sampling

    @property
    def model_id(self) -> str:
        return next(iter(self.names))


def parse_chat(
    body: bytes | bytearray, asked: Asked, *, check: Callable[[], None] = lambda: None
) -> ChatRequest:
    """Check and parse the body of a request to `/v1/chat/completions`: pictures last.

    Args:
        check: called before each message and picture; whatever it raises stops the work.
    Raises:
        ApiError: 400 for an invalid request, 404 for another model.
    """
    fields = parse_json(body)
    neutral = dict(CHAT_NEUTRAL)
    for calls, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if fields.get(choice) == "none" and isinstance(fields.get(calls), list):
            neutral[calls] = (fields[calls],)  # there, and not to be used
    check_names(fields, used=CHAT, harmless=HARMLESS, neutral=neutral)
    _check_model(fields, asked)
    num_choices = parse_num_choices(fields)
    common = _parse_common(fields, asked, num_choices=num_choices, num_rows=num_choices)
    extra: dict[str, Any] = {"num_logprobs": parse_chat_logprobs(fields)}
    open_thinking = _parse_thinking(fields, asked.engine)
    if open_thinking is not None:
        extra["open_thinking"] = open_thinking
    common["sampling"] = changed(common["sampling"], extra)
    check_told(common["sampling"], num_rows=num_choices)
    entries = take(fields, "messages", list, required=True)
    messages, images = parse_messages(entries, asked.engine, check=check)
    _check_beginning(fields, messages, open_thinking=common["sampling"].open_thinking)
    return ChatRequest(messages=messages, images=images, **common)


def parse_text(
    body: bytes | bytearray, asked: Asked, *, check: Callable[[], None] = lambda: None
) -> TextRequest:
    """The same of `/v1/completions`."""
    fields = parse_json(body)
    check_names(fields, used=TEXT, harmless=HARMLESS, neutral=TEXT_NEUTRAL)
    _check_model(fields, asked)
    check()
    prompts = _parse_prompts(fields, asked.engine)
    num_choices = parse_num_choices(fields, num_prompts=len(prompts))
    if take(fields, "best_of", int) not in (None, num_choices):
        raise bad("best_of must be n: this server gives all answers that it computes", "best_of")
    num_rows = num_choices * len(prompts)
    common = _parse_common(fields, asked, num_choices=num_choices, num_rows=num_rows)
    extra = {"num_logprobs": parse_text_logprobs(fields), "open_thinking": False}
    common["sampling"] = changed(common["sampling"], extra)
    check_told(common["sampling"], num_rows=num_rows)
    return TextRequest(prompts=prompts, **common)


def _check_model(fields: dict[str, Any], asked: Asked) -> None:
    name = take(fields, "model", str, required=True)
    if name not in asked.names:
        raise ApiError(
            404,
            f"the model {name[:100]!r} does not exist; this server has {asked.model_id!r}",
            param="model",
            code="model_not_found",
        )


def _parse_common(
    fields: dict[str, Any], asked: Asked, *, num_choices: int, num_rows: int
) -> dict[str, Any]:
    """The fields of `Request`."""
    stops = parse_stops(fields)
    is_stream, with_usage = parse_stream(fields)
    sampling = parse_sampling(
        fields,
        asked.defaults,
        num_rows=num_rows,
        max_tokens=asked.engine.max_tokens,
        vocab_size=asked.engine.model.config.vocab_size,
    )
    if num_choices > 1 and sampling.num_beams > 1:
        raise bad(
            f"n must be 1 with num_beams {sampling.num_beams}: a beam search gives one answer", "n"
        )
    return {
        "sampling": sampling,
        "stops": stops,
        "num_choices": num_choices,
        "is_stream": is_stream,
        "with_usage": with_usage,
    }


def _parse_thinking(fields: dict[str, Any], engine: VLMEngine) -> bool | None:
    """`open_thinking` of `chat_template_kwargs`, a field of vLLM's; None where it is not given.

    `enable_thinking` is the name that most models have for it.
    """
    options, where = take(fields, "chat_template_kwargs", dict) or {}, "chat_template_kwargs"
    names = ("open_thinking", "enable_thinking")
    for name in options:
        if name not in names:
            raise bad(f"{where}.{name[:100]} is not supported; only {names[0]} is", where)
    given = {name: options[name] for name in names if options.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool):
            raise bad(f"{where}.{name} must be true or false", where)
        if value and not engine.can_think:
            raise bad(f"{where}.{name}: {cannot_think(engine.generation)}", where)
    if len(set(given.values())) > 1:
        raise bad(f"{where}: {' and '.join(names)} contradict each other", where)
    return next(iter(given.values()), None)


def _check_beginning(
    fields: dict[str, Any], messages: list[Message], *, open_thinking: bool
) -> None:
    """Whether the fields agree with how the messages end."""
    is_begun = messages[-1]["role"] == "assistant"
    if is_begun and open_thinking:
        raise bad("thinking comes before an answer, and the last message begins one", "messages")
    for name, wanted in (
        ("continue_final_message", is_begun),
        ("add_generation_prompt", not is_begun),
    ):
        given = take(fields, name, bool)
        if given not in (None, wanted):
            raise bad(
                f"{name} must be {str(wanted).lower()}: a last message of the assistant is "
                "continued, after any other a new one begins",
                name,
            )


def _parse_prompts(fields: dict[str, Any], engine: VLMEngine) -> list[str | list[int]]:
    """A text, ids, or an array of one kind."""
    given, size = fields.get("prompt"), engine.model.config.vocab_size
    if isinstance(given, str) or (isinstance(given, list) and given and is_integer(given[0])):
        given = [given]
    if not isinstance(given, list) or not given:
        raise bad("prompt must be a text, an array of ids, or an array of these", "prompt")
    if len(given) > MAX_CHOICES:
        raise bad(f"{len(given):,} prompts; at most {MAX_CHOICES} are taken", "prompt")
    for prompt in given:
        if isinstance(prompt, str):
            if len(prompt) > engine.context.max_characters:
                too_long = f"the prompt has {len(prompt):,} characters; no prompt of over "
                limit = f"{engine.context.max_characters:,} fits"
                code = "context_length_exceeded"
                raise ApiError(400, too_long + limit, param="prompt", code=code)
        elif not isinstance(prompt, list) or not all(
            is_integer(i) and 0 <= i < size for i in prompt
        ):
            raise bad(f"prompt must be texts, or arrays of ids from 0 to {size - 1}", "prompt")
    return given
