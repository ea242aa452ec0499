"""Owns what the page's server refuses before Gradio sees it: files that lie on other servers.

Gradio would fetch an address that a visitor names, in a file's place or behind `/file=`; here
nothing is fetched from anywhere.
"""

import json
import re

from starlette.responses import PlainTextResponse

REFUSED_PATH = re.compile(r"/(file[=/]|proxy=)\s*\w+:", re.IGNORECASE)
ADDRESS = re.compile(r"\s*\w+:(//|\\\\)")
FORMS = {b"multipart/form-data", b"application/x-www-form-urlencoded"}
MAX_BODY_BYTES = 4 << 20  # of a question: pictures are uploaded before, on their own


def names_an_address(data) -> bool:
    """Whether any file in decoded JSON has an address of another server for a path."""
    if isinstance(data, dict):
        path = data.get("path")
        is_address = isinstance(path, str) and ADDRESS.match(path) is not None
        return is_address or any(names_an_address(value) for value in data.values())
    return isinstance(data, list) and any(names_an_address(value) for value in data)


class NoRemoteFiles:
    """ASGI middleware: 403 for a request that would make this server fetch something."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = None
        if REFUSED_PATH.search(scope["path"]):
            refusal = PlainTextResponse("remote files are off", status_code=403)
        elif scope["method"] == "POST" and _is_json(scope):
            body, is_whole = await _read(receive)
            refusal = _refusal_of(body, is_whole)
            receive = _replay(body, receive)
        await (refusal or self.app)(scope, receive, send)


def _is_json(scope) -> bool:
    """Whether the body might be read as JSON: any spelling will do for FastAPI, forms are none."""
    kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    return not kinds or any(kind.partition(b";")[0].strip().lower() not in FORMS for kind in kinds)


async def _read(receive) -> tuple[bytes, bool]:
    """The body, as far as it may be long."""
    body, is_whole = b"", False
    while not is_whole and len(body) <= MAX_BODY_BYTES:
        message = await receive()
        body += message.get("body", b"")
        is_whole = not message.get("more_body", False)
    return body, is_whole


def _refusal_of(body: bytes, is_whole: bool) -> PlainTextResponse | None:
    if not is_whole or len(body) > MAX_BODY_BYTES:
        return PlainTextResponse("too long", status_code=413)
    try:
        has_address = names_an_address(json.loads(body or b"null"))
    except (ValueError, RecursionError):
        return PlainTextResponse("not JSON", status_code=400)
    return PlainTextResponse("remote files are off", status_code=403) if has_address else None


def _replay(body: bytes, receive):
    """A `receive` that gives the body again, then goes on with the connection."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return messages.pop() if messages else await receive()

    return again
