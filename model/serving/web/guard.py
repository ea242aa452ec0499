"""Owns the middleware between the page's visitors and Gradio: every request passes through it.

1. A request that the page never makes is refused.
2. The others are checked before Gradio sees them.
3. If Gradio still fails on one, the visitor gets status 400 and the server's log the traceback.
"""

import asyncio
import contextlib
import logging
import math
import re
import secrets
from pathlib import Path
from urllib.parse import parse_qs

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.serving.web.protection.care import Care
from model.serving.web.protection.login import Throttle
from model.serving.web.protection.requests import (
    SESSION,
    Refused,
    check_file,
    check_join,
    find_route,
    read_json,
)
from model.serving.web.uploads import Uploads

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 1 << 20  # of a question; its pictures have requests of their own
MAX_LOGIN_BYTES = 16 << 10
BODY_S = 30  # for a whole body of that size
SEND_S = 60  # for the client to read a piece; after that the connection is closed
TOKEN = re.compile(r"[A-Za-z0-9_-]{22}")
UPLOAD_DONE = b'data: {"msg": "done"}\n\n'


class Guard:
    """ASGI middleware around all of Gradio's application.

    Args:
        folder: holds all files that a visitor may name.
    """

    def __init__(self, app: ASGIApp, *, care: Care, uploads: Uploads, folder: Path):
        self._app, self._care, self._uploads, self._folder = app, care, uploads, folder
        self._throttle = Throttle()
        # A random name: servers on other ports of this machine share its cookies.
        self._cookie = f"visitor-{secrets.token_hex(4)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        reply = _Reply(send)
        try:
            await self._serve(Request(scope, receive), reply)
        except Refused as refusal:
            await _say(reply, refusal.status, str(refusal))
        except (ClientDisconnect, _NoReader):
            pass
        except Exception as error:
            is_ours = isinstance(error, OSError | MemoryError)
            log.exception("%s %.200s broke", scope["method"], scope["path"])
            await _say(reply, 500 if is_ours else 400, "this could not be answered")
        if reply.is_withheld:
            await _say(reply, 400, "this could not be answered")

    async def _serve(self, request: Request, reply: "_Reply") -> None:
        scope = request.scope
        route, match = find_route(scope["method"], scope["path"])
        if not route.is_public and not _has_entered(request):
            raise Refused(401, "log in first")
        visitor = self._visitor_of(request)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._care.visitors.here(visitor))
            if route.name == "upload":
                response = await self._uploads.take(request, visitor)
                return await response(scope, request.receive, reply.send)
            if route.name == "progress":  # the page waits for the event of its end
                response = Response(UPLOAD_DONE, media_type="text/event-stream")
                return await response(scope, request.receive, reply.send)
            if route.name == "login":
                return await self._log_in(request, reply)
            receive = request.receive
            if route.name == "page" and self._cookie not in request.cookies:
                reply.cookie = f"{self._cookie}={secrets.token_urlsafe(16)}"
            if route.name in ("page", "config"):
                scope["query_string"] = b""  # parameters may name files
            elif route.name == "file":
                check_file(match["path"], self._folder)
            elif route.name == "heartbeat":
                stack.enter_context(self._care.sessions.here(match["session"]))
            elif route.name == "data":
                stack.enter_context(self._care.sessions.here(self._session_asked(scope)))
            elif route.name == "join":
                body = await self._json_body(request)
                session = check_join(read_json(body), scope["app"].get_blocks(), self._folder)
                stack.enter_context(self._care.sessions.here(session))
                receive = _replay(body, receive)
            await self._app(scope, receive, reply.send)

    def _visitor_of(self, request: Request) -> str:
        """The visitor's key: our cookie, or without one the address."""
        token = request.cookies.get(self._cookie, "")
        return f"cookie {token}" if TOKEN.fullmatch(token) else f"address {_client(request)}"

    def _session_asked(self, scope: Scope) -> str:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])
        if not re.fullmatch(SESSION, given[0]) or not self._care.knows(given[0]):
            raise Refused(404, "nothing was asked in this session")
        return given[0]

    async def _json_body(self, request: Request) -> bytes:
        kinds = request.headers.getlist("content-type")
        if [kind.partition(";")[0].strip().lower() for kind in kinds] != ["application/json"]:
            raise Refused(415, "the content type is not application/json")
        return await _read(request.receive, MAX_BODY_BYTES)

    async def _log_in(self, request: Request, reply: "_Reply") -> None:
        client, throttle = _client(request), self._throttle
        body = await _read(request.receive, MAX_LOGIN_BYTES)
        wait_s = throttle.wait_s(client)
        if wait_s > 0:
            raise Refused(429, f"too many wrong passwords; try again in {math.ceil(wait_s)} s")
        throttle.note_attempt(client)
        if not await throttle.pass_one_by_one():
            raise Refused(429, "too many wrong passwords; try again in a minute")
        await self._app(request.scope, _replay(body, request.receive), reply.send)
        if reply.status is not None and reply.status < 400:
            throttle.forgive(client)


class _NoReader(Exception):
    """The client does not read the reply."""


class _Reply:
    """The reply as it is sent; a status 500 of the application is withheld, to be replaced."""

    def __init__(self, send: Send):
        self._send = send
        self.status: int | None = None
        self.is_withheld = self.is_done = False
        self.cookie: str | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] == 500:
                self.is_withheld = True
                return
            self.status = message["status"]
            if self.cookie:
                value = f"{self.cookie}; Path=/; HttpOnly; SameSite=Lax".encode()
                headers = [*message["headers"], (b"set-cookie", value)]
                message = {**message, "headers": headers}
        elif self.is_withheld:
            return
        elif message["type"] == "http.response.body":
            self.is_done = not message.get("more_body", False)
        try:
            await asyncio.wait_for(self._send(message), SEND_S)
        except TimeoutError:
            raise _NoReader from None

    async def finish(self, response: Response) -> None:
        """Send this response if none has begun; otherwise end the one that has."""
        self.is_withheld = False
        if self.status is None:
            self.status, self.is_done = response.status_code, True
            await response({"type": "http"}, None, self._send)
        elif not self.is_done:
            self.is_done = True
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _say(reply: _Reply, status: int, message: str) -> None:
    await reply.finish(PlainTextResponse(message, status_code=status))


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


def _has_entered(request: Request) -> bool:
    """Whether a visitor is logged in, or need not be, as Gradio's `login_check` decides."""
    app = request.scope["app"]
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return app.auth is None or any(request.cookies.get(n) in app.tokens for n in names)


async def _read(receive: Receive, max_bytes: int) -> bytes:
    """A whole body.

    Raises:
        Refused: 413 as soon as it is too long, 408 after `BODY_S`.
    """
    pieces: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                pieces.append(message.get("body", b""))
                num_bytes += len(pieces[-1])
                if num_bytes > max_bytes:
                    raise Refused(413, f"more than {max_bytes} bytes")
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise Refused(408, "the body did not come") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body again, then goes on with the connection."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again
