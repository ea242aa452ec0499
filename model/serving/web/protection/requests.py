"""Owns which requests the page's server accepts, and what their bodies may hold.

Gradio has some seventy routes; those that the page in a browser does not use are refused. Bodies
are checked before Gradio sees them: it answers many malformed ones with "internal server error".
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

API = "/gradio_api"
MAX_PATH = 1024  # characters: no file of the page has a longer one
MAX_TEXT = 100_000  # characters of one text, far over the longest question
MAX_DEPTH = 12  # of lists and objects in each other; the page sends 5
SESSION = r"[A-Za-z0-9_-]{1,64}"
ADDRESS = re.compile(r"\s*\w+:(//|\\\\)")


class Refused(Exception):
    """A request is refused, with this HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Route:
    """A route that the page uses; `is_public`: without a password."""

    name: str
    methods: frozenset[str]
    pattern: re.Pattern[str]
    is_public: bool = False


def _route(name: str, methods: str, pattern: str, *, is_public: bool = False) -> Route:
    return Route(name, frozenset(methods.split()), re.compile(pattern, re.DOTALL), is_public)


ROUTES = (
    _route("page", "GET HEAD", "/", is_public=True),  # or the login form
    _route("asset", "GET HEAD", r"/(assets|static)/(?!.*\.\.)[\w./-]+", is_public=True),
    _route("theme", "GET HEAD", r"/theme\.css", is_public=True),
    _route("icon", "GET HEAD", r"/favicon\.ico", is_public=True),
    _route("login", "POST", "/login", is_public=True),
    _route("started", "GET", f"{API}/startup-events", is_public=True),  # by Gradio, at launch
    _route("config", "GET", "/config"),
    _route("heartbeat", "GET", f"{API}/heartbeat/(?P<session>{SESSION})"),
    _route("join", "POST", f"{API}/queue/join"),
    _route("data", "GET", f"{API}/queue/data"),
    _route("upload", "POST", f"{API}/upload"),
    _route("progress", "GET", f"{API}/upload_progress"),
    _route("file", "GET HEAD", f"{API}/file=(?P<path>.+)"),
)


def find_route(method: str, path: str) -> tuple[Route, re.Match[str]]:
    """The route of a request.

    Raises:
        Refused: 404 for a route that the page does not use, 405 for another method.
    """
    for route in ROUTES:
        match = route.pattern.fullmatch(path)
        if match:
            if method not in route.methods:
                raise Refused(405, f"{method} is not for {route.name}")
            return route, match
    raise Refused(404, "not found")


def check_file(path: str, folder: Path) -> None:
    """Refuse (403) a path outside the folder of files that visitors may see."""
    if (
        len(path) > MAX_PATH
        or not path.isprintable()
        or ".." in Path(path).parts
        or not Path(path).is_relative_to(folder)
    ):
        raise Refused(403, "no such file")


def read_json(body: bytes) -> Any:
    """A body as strict JSON: no NaN or infinity, no huge numbers, no NUL or lone surrogate.

    Raises:
        Refused: 400.
    """
    try:
        data = json.loads(
            body, parse_constant=_no_constant, parse_float=_finite, parse_int=_small_int
        )
        _check_values(data, depth=0)
    except RecursionError:
        raise Refused(400, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"not JSON that this page sends: {str(error)[:100]}") from None
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _small_int(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError("a number is too large")
    return int(digits)


def _check_values(data: Any, *, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(data, str):
        if len(data) > MAX_TEXT:
            raise ValueError(f"a text of more than {MAX_TEXT} characters")
        if "\0" in data or any("\ud800" <= c <= "\udfff" for c in data):
            raise ValueError("a text holds a NUL or half a character")
    elif isinstance(data, dict):
        for key, value in data.items():
            _check_values(key, depth=depth + 1)
            _check_values(value, depth=depth + 1)
    elif isinstance(data, list):
        for value in data:
            _check_values(value, depth=depth + 1)


def check_join(data: Any, blocks: Any, folder: Path) -> str:
    """Check the request by which the page queues an event; returns the page's session.

    Args:
        data: from `read_json`.
        blocks: the page's `gr.Blocks`, with its functions and parts.
        folder: holds all files that a visitor may name.
    Raises:
        Refused: 403 for a file outside the folder, otherwise 422.
    """
    if not isinstance(data, dict):
        raise Refused(422, "not an object")
    session, index = data.get("session_hash"), data.get("fn_index")
    if not isinstance(session, str) or not re.fullmatch(SESSION, session):
        raise Refused(422, "session_hash is not one of this page")
    if type(index) is not int or index not in blocks.fns:
        raise Refused(422, "fn_index is not one of this page")
    function, trigger = blocks.fns[index], data.get("trigger_id")
    known = {part for part, _ in function.targets}
    if trigger is not None and (type(trigger) is not int or trigger not in known):
        raise Refused(422, "trigger_id is not one of this page")
    if not isinstance(data.get("event_data"), dict | None):
        raise Refused(422, "event_data is no object")
    unknown = data.keys() - {"data", "event_data", "fn_index", "trigger_id", "session_hash"}
    if unknown:
        raise Refused(422, "the request holds fields that the page does not send")
    inputs, values = function.inputs, data.get("data")
    if not isinstance(values, list) or len(values) != len(inputs):
        raise Refused(422, f"data is no list of {len(inputs)}")
    for part, value in zip(inputs, values, strict=True):
        if not _fits(type(part).__name__, value):
            raise Refused(422, f"data does not fit: {type(part).__name__}")
    _check_files(data, folder)
    return session


def _fits(kind: str, value: Any) -> bool:
    """Whether a part of the page, by its class name, sends such a value."""
    if kind == "State":  # kept by the server, which ignores what is sent
        return value is None
    if kind == "MultimodalTextbox":
        return (
            isinstance(value, dict)
            and isinstance(value.get("text"), str)
            and isinstance(value.get("files"), list)
            and all(_is_file(file) for file in value["files"])
        )
    if kind == "Image":
        return value is None or _is_file(value)
    if kind == "Checkbox":
        return isinstance(value, bool)
    if kind == "Slider":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "Number":
        return isinstance(value, int | float | None) and not isinstance(value, bool)
    return isinstance(value, str)  # Radio, Dropdown, Textbox


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("path"), str) and bool(value["path"])


def _check_files(data: Any, folder: Path) -> None:
    """Refuse URLs, which Gradio would fetch, and paths outside the folder, at any depth."""
    if isinstance(data, dict):
        if isinstance(data.get("path"), str):
            if ADDRESS.match(data["path"]):
                raise Refused(403, "remote files are off")
            check_file(data["path"], folder)
        for value in data.values():
            _check_files(value, folder)
    elif isinstance(data, list):
        for value in data:
            _check_files(value, folder)
