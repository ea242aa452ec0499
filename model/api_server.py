"""Owns the OpenAI-compatible server: `python web_demo.py --api`.

    POST /v1/chat/completions   text and pictures (data URLs), whole or streamed
    GET  /v1/models

A few requests run at once, the others wait their turn; a client that goes away frees its place.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import socket
from collections.abc import AsyncIterator

import anyio
import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model.api_reply import DONE, Completion, event
from model.api_request import ApiError, ChatRequest, parse_request
from model.device import OutOfMemory
from model.inference import Sampling, VLMEngine

MAX_BODY_BYTES = 20 * 2**20
MAX_WAIT_S = 600  # for one's turn

logger = logging.getLogger(__name__)


class Turns:
    """Lets a few run at once and a limited number wait."""

    def __init__(self, *, concurrency: int, queue: int):
        self._free = asyncio.Semaphore(concurrency)
        self._max_waiting = queue
        self._num_waiting = 0

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for a turn and hold it.

        Raises:
            ApiError: 429 if too many wait already, 503 if the wait is too long.
        """
        if self._free.locked() and self._num_waiting >= self._max_waiting:
            raise ApiError(429, "too many requests are waiting; try again later", code="queue_full")
        self._num_waiting += 1
        try:
            with anyio.fail_after(MAX_WAIT_S):
                await self._free.acquire()
        except TimeoutError:
            raise ApiError(503, "the server is overloaded; try again later") from None
        finally:
            self._num_waiting -= 1
        try:
            yield
        finally:
            self._free.release()


def error_response(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = json.dumps(error.body)  # in ASCII: it may quote half a character
    return Response(body, error.status, headers=headers, media_type="application/json")


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OutOfMemory):
        logger.error("%s", error)
        return ApiError(503, str(error))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed on this request ({type(error).__name__})")


class ChatCompletions:
    """The ASGI application behind `/v1/chat/completions`."""

    def __init__(
        self, engine: VLMEngine, *, model_id: str, defaults: Sampling, concurrency: int, queue: int
    ):
        self._engine, self._model_id, self._defaults = engine, model_id, defaults
        self._turns = Turns(concurrency=concurrency, queue=queue)

    async def __call__(self, scope, receive, send) -> None:
        request = Request(scope, receive)
        try:
            body = await _read_body(request)
        except ApiError as error:
            return await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            return
        async with anyio.create_task_group() as group:

            async def stop_when_the_client_leaves() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(stop_when_the_client_leaves)
            await self._reply(body, scope, receive, send)
            group.cancel_scope.cancel()

    async def _reply(self, body: bytes, scope, receive, send) -> None:
        has_begun = False

        async def tell(message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            request = await to_thread.run_sync(self._parse, body)
            async with self._turns.take():
                await self._answer(request, scope, receive, tell)
        except Exception as error:
            told = _as_api_error(error)
            if not has_begun:
                await error_response(told)(scope, receive, send)
            else:  # the status is out: the protocol tells it as one more event
                await send({"type": "http.response.body", "body": event(told.body)})

    def _parse(self, body: bytes) -> ChatRequest:
        return parse_request(body, self._engine, model_id=self._model_id, defaults=self._defaults)

    async def _answer(self, request: ChatRequest, scope, receive, send) -> None:
        try:
            stream = await to_thread.run_sync(
                self._engine.stream, request.messages, request.images, request.sampling
            )
        except OutOfMemory:
            raise
        except (ValueError, OSError) as error:  # what the user can mend; later ones are ours
            raise ApiError(400, str(error)) from error
        completion = Completion(request, self._model_id, stream)
        if request.is_stream:
            await self._send_events(completion, send)
        else:
            text = "".join([piece async for piece in completion.pieces()])
            await JSONResponse(completion.whole(text))(scope, receive, send)

    async def _send_events(self, completion: Completion, send) -> None:
        async def body(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                   (b"cache-control", b"no-cache")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await body(completion.chunk({"role": "assistant", "content": ""}))
        async for piece in completion.pieces():
            await body(completion.chunk({"content": piece}))
        await body(completion.chunk({}, finish_reason=completion.finish_reason))
        if completion.request.with_usage:
            await body(completion.usage_chunk())
        await body(DONE, more=False)


async def _read_body(request: Request) -> bytes:
    """The body of a JSON request, no larger than is allowed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the content type must be application/json")
    body, num_bytes = bytearray(), 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes <= MAX_BODY_BYTES:
            body += chunk
        elif num_bytes > 10 * MAX_BODY_BYTES:
            break  # up to there the rest is read, so that the client gets to hear of it
    if num_bytes > MAX_BODY_BYTES:
        raise ApiError(413, f"the request is larger than {MAX_BODY_BYTES:,} bytes")
    return bytes(body)


class RequireKey:
    """Middleware: every request must carry the key, if there is one."""

    def __init__(self, app, api_key: str | None):
        self._app = app
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and self._expected is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "incorrect API key provided", code="invalid_api_key")
                return await error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)


def create_app(
    engine: VLMEngine,
    defaults: Sampling,
    *,
    concurrency: int = 2,
    queue: int = 64,
    api_key: str | None = None,
) -> Starlette:
    """The server's application.

    Args:
        defaults: the sampling of a request that says nothing of it.
        concurrency: answers at once. queue: requests that may wait beside them.
        api_key: what `Authorization: Bearer` must name; None asks for none.
    """
    model_id = engine.path.stem if engine.path.is_file() else engine.path.resolve().name
    model = {"id": model_id, "object": "model", "created": int(engine.path.stat().st_mtime),
             "owned_by": "minimind-v"}  # fmt: skip

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name == model_id:
            return JSONResponse(model)
        return error_response(ApiError(404, f"no model {name[:100]!r}", code="model_not_found"))

    async def http_error(_request: Request, error: HTTPException) -> Response:
        response = error_response(ApiError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    chat = ChatCompletions(
        engine, model_id=model_id, defaults=defaults, concurrency=concurrency, queue=queue
    )
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
        ],
        middleware=[Middleware(RequireKey, api_key=api_key)],
        exception_handlers={HTTPException: http_error},
    )


def serve_api(engine: VLMEngine, defaults: Sampling, *, host: str, port: int, **limits) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status.

    Args:
        port: 0 takes a free one. limits: as of `create_app`.
    Raises:
        OSError: the address is taken or not this machine's.
    """
    app = create_app(engine, defaults, **limits)
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # it repeats the address
        raise OSError(f"cannot listen at {host}:{port}: {reason}; try another --port") from error
    name = f"[{host}]" if ":" in host else host
    print(f"serving http://{name}:{listener.getsockname()[1]}/v1 (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])
    return 0
