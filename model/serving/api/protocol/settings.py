"""Owns how a request asks for its answers to be generated: sampling, their number, their ends."""

from dataclasses import replace
from typing import Any

from model.generation.sampling import MAX_LOGPROBS, Sampling
from model.serving.api.protocol.fields import ApiError, bad, is_integer, take, take_either

MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_STOP_IDS = 16
MAX_CHOICES = 16  # of all prompts together
MAX_TOLD = 200_000  # log probabilities of a request: they are kept until the answer is whole
MAX_TEXT_LOGPROBS = 5  # of /v1/completions, as in the protocol
NAMES = {
    "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "n", "top_k",
    "repetition_penalty", "repeat_penalty", "num_beams", "length_penalty", "min_p",
    "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
    "skip_special_tokens", "logprobs",
}  # fmt: skip


def parse_sampling(
    fields: dict[str, Any], defaults: Sampling, *, num_rows: int, max_tokens: int, vocab_size: int
) -> Sampling:
    """The settings of a request's answers; what it does not name is as in `defaults`.

    Args:
        num_rows: answers that it asks for, of all prompts together.
        max_tokens: what they may have together.
    Raises:
        ApiError: 400 for a value that is out of its range or does not go with another.
    """
    temperature, num_beams = _parse_search(fields)
    top_p, seed = take(fields, "top_p", float), take(fields, "seed", int)
    if top_p is not None and not 0 <= top_p <= 1:
        raise bad("top_p must be from 0 to 1", "top_p")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise bad("seed must be a 64-bit integer", "seed")
    longest = _parse_length(fields, num_rows=num_rows, max_tokens=max_tokens)
    if longest is None:
        longest = max(1, min(defaults.max_new_tokens, max_tokens // num_rows))
    chosen = {
        "max_new_tokens": longest,
        "temperature": temperature,
        "top_p": None if top_p is None else max(top_p, 1e-9),  # 0: the likeliest token alone
        "repetition_penalty": take_either(fields, "repetition_penalty", "repeat_penalty", float)[1],
        "seed": None if seed is None else seed % 2**63,
        "num_beams": num_beams,
        "stop_token_ids": _parse_stop_ids(fields, vocab_size=vocab_size),
        **{name: take(fields, name, int) for name in ("top_k", "min_tokens")},
        **{name: take(fields, name, bool) for name in ("ignore_eos", "skip_special_tokens")},
        **{
            name: take(fields, name, float)
            for name in ("length_penalty", "min_p", "presence_penalty", "frequency_penalty")
        },
    }
    return changed(defaults, {k: v for k, v in chosen.items() if v is not None})


def changed(sampling: Sampling, fields: dict[str, Any]) -> Sampling:
    """`Sampling` with other fields; raises `ApiError` where they are refused."""
    try:
        return replace(sampling, **fields)
    except ValueError as error:
        message = str(error).replace("--num_logprobs", "logprobs").replace("--", "")
        raise bad(message, message.split()[0]) from None


def _parse_search(fields: dict[str, Any]) -> tuple[float | None, int | None]:
    """Temperature and number of beams.

    What a request names counts before the other's default: beams do not go with a temperature.
    """
    temperature, num_beams = take(fields, "temperature", float), take(fields, "num_beams", int)
    if temperature is not None and not 0 <= temperature <= 2:
        raise bad("temperature must be from 0 to 2", "temperature")
    if temperature is None and num_beams is not None and num_beams > 1:
        temperature = 0.0
    elif temperature and num_beams is None:
        num_beams = 1
    return temperature, num_beams


def _parse_length(fields: dict[str, Any], *, num_rows: int, max_tokens: int) -> int | None:
    """The longest answer; all answers together count against the limit."""
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    longest: int | None = take(fields, name, int)
    if longest is None:
        return None
    if not 1 <= longest <= max_tokens:
        raise bad(f"{name} must be at least 1 and at most {max_tokens}", name)
    if longest * num_rows > max_tokens:
        raise bad(
            f"{num_rows} answers of {name} {longest} are {num_rows * longest:,} tokens; at most "
            f"{max_tokens:,} are taken; lower n or {name}",
            name,
        )
    return longest


def parse_num_choices(fields: dict[str, Any], *, num_prompts: int = 1) -> int:
    """How many answers each prompt gets."""
    num_choices: int = take(fields, "n", int) or 1
    if fields.get("n") is not None and not 1 <= fields["n"] * num_prompts <= MAX_CHOICES:
        raise bad(f"n times the number of prompts must be 1 to {MAX_CHOICES}", "n")
    return num_choices


def parse_chat_logprobs(fields: dict[str, Any]) -> int | None:
    """`num_logprobs` of `Sampling`, of chat completions; None where they do not ask for any."""
    wanted, number = take(fields, "logprobs", bool), take(fields, "top_logprobs", int)
    if number is not None and not 0 <= number <= MAX_LOGPROBS:
        raise bad(f"top_logprobs must be from 0 to {MAX_LOGPROBS}", "top_logprobs")
    if number and not wanted:
        raise bad("top_logprobs needs logprobs true", "top_logprobs")
    return (number or 0) if wanted else None


def check_told(sampling: Sampling, *, num_rows: int) -> None:
    """Refuse a request for more log probabilities than one may hold."""
    if sampling.num_logprobs is None:
        return
    num_told = sampling.max_new_tokens * num_rows * (sampling.num_logprobs + 1)
    if num_told > MAX_TOLD:
        raise bad(
            f"{num_told:,} log probabilities; at most {MAX_TOLD:,} are taken: lower max_tokens, n "
            "or the number of logprobs",
            "logprobs",
        )


def parse_text_logprobs(fields: dict[str, Any]) -> int | None:
    """The same, of `/v1/completions`."""
    number: int | None = take(fields, "logprobs", int)
    if number is not None and not 0 <= number <= MAX_TEXT_LOGPROBS:
        raise bad(f"logprobs must be from 0 to {MAX_TEXT_LOGPROBS}", "logprobs")
    return number


def parse_stops(fields: dict[str, Any]) -> list[str]:
    stops = fields.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    is_right = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_right or not all(isinstance(stop, str) and stop for stop in stops):
        raise bad(f"stop must be a non-empty string or up to {MAX_STOPS} of them", "stop")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise bad(
            f"stop has {longest:,} characters; at most {MAX_STOP_CHARACTERS} are taken", "stop"
        )
    return stops


def _parse_stop_ids(fields: dict[str, Any], *, vocab_size: int) -> tuple[int, ...] | None:
    ids = take(fields, "stop_token_ids", list)
    if ids is None:
        return None
    if len(ids) > MAX_STOP_IDS or not all(is_integer(i) and 0 <= i < vocab_size for i in ids):
        raise bad(
            f"stop_token_ids must be up to {MAX_STOP_IDS} ids from 0 to {vocab_size - 1}",
            "stop_token_ids",
        )
    return tuple(ids)


def parse_stream(fields: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the answer is streamed, and whether usage ends it."""
    is_stream: bool = take(fields, "stream", bool) or False
    options = take(fields, "stream_options", dict)
    if options is not None and not is_stream:
        raise bad("stream_options is only allowed when stream is true", "stream_options")
    return is_stream, take(options or {}, "include_usage", bool) or False


def check_names(
    fields: dict[str, Any],
    *,
    used: set[str],
    harmless: set[str],
    neutral: dict[str, tuple[Any, ...]],
) -> None:
    """Refuse what would not be heeded.

    Args:
        used: fields that are. harmless: accepted and ignored: no answer depends on them.
        neutral: fields that are not offered, and their values that ask for nothing.
    Raises:
        ApiError: any other field or value.
    """
    for name, value in fields.items():
        if name in neutral:
            if value is not None and value not in neutral[name]:
                raise _not_offered(name, neutral[name])
        elif name not in used | harmless:
            raise bad(f"unrecognized request argument: {name[:100]}", name[:100])


def _not_offered(name: str, neutral: tuple[Any, ...]) -> ApiError:
    way_out = "leave it out"
    if name == "response_format":
        way_out += ', or ask for {"type": "text"}'
    elif name in ("tools", "functions"):
        choice = "tool_choice" if name == "tools" else "function_call"
        way_out += f', or set {choice} to "none"'
    return bad(f"{name} is not supported by this server; {way_out}", name)
