"""Owns reading JSON fields strictly, and errors as the protocol reports them."""

import json
from typing import Any

MAX_VALUES = 500_000  # in the JSON: millions of empty arrays would take gigabytes
MAX_DIGITS = 400  # of an integer
NAMES = {
    str: "a string", list: "an array", dict: "an object", bool: "true or false", int: "an integer",
    float: "a number",
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


def bad(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """A body's fields; raises `ApiError` where it is no JSON object, or an attack on the parser."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise bad(f"the body holds more than {MAX_VALUES:,} values")
    try:
        fields = json.loads(
            body, parse_constant=_refuse, parse_int=_integer, object_pairs_hook=_object
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise bad(f"the body is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(fields, dict):
        raise bad("the body must be a JSON object")
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


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def take(fields: dict[str, Any], name: str, kind: type, *, required: bool = False) -> Any:
    """A field of the right type, or None where it is absent or null."""
    value = fields.get(name)
    if value is None:
        if required:
            raise bad(f"{name} is required", name)
        return None
    is_right = isinstance(value, (int, float) if kind is float else kind)
    if not is_right or (isinstance(value, bool) and kind is not bool):
        raise bad(f"{name} must be {NAMES[kind]}", name)
    try:
        return float(value) if kind is float else value
    except OverflowError:
        raise bad(f"{name} is too large", name) from None


def take_either(fields: dict[str, Any], first: str, second: str, kind: type) -> tuple[str, Any]:
    """A field that has two names, and the one it was given by; the second counts before the first.

    Raises:
        ApiError: both are given, with different values.
    """
    values = [take(fields, name, kind) for name in (first, second)]
    if None not in values and values[0] != values[1]:
        raise bad(f"{first} and {second} are the same setting; leave one of them out", first)
    name = first if values[1] is None else second
    return name, values[first != name]
