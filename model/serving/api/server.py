"""Owns the OpenAI-compatible server: `python web_demo.py --api`.

    POST /v1/chat/completions   text and pictures (data URLs), whole or streamed
    GET  /v1/models

A few requests run at once, but one beam search at most; the others wait in a queue. A client that
disconnects, or keeps the server waiting too long, frees its place.
"""

import hmac
import json
import logging
import socket
from collections.abc import Collection

import anyio
import torch
import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.generation.engine import Stream, VLMEngine
from model.generation.sampling import Sampling
from model.machine.device import OutOfMemory
from model.serving.api.body import BODY_TIMEOUT_S, read_body
from model.serving.api.connection import server_config
from model.serving.api.places import Client, Gone, Places
from model.serving.api.reply import DONE, Completion, event
from model.serving.api.request import ApiError, ChatRequest, parse_request
from model.serving.hosts import ANY, KnownHosts, allowed_hosts

IDLE_CONNECTIONS = 128  # in addition to one for each place

logger = logging.getLogger(__name__)


def error_response(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = json.dumps(error.body)  # in ASCII: it may quote a lone surrogate
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
        self,
        engine: VLMEngine,
        *,
        model_id: str,
        defaults: Sampling,
        concurrency: int,
        queue: int,
        body_timeout_s: float,
    ):
        self._engine, self._model_id, self._defaults = engine, model_id, defaults
        self._places = Places(concurrency=concurrency, queue=queue)
        self._parsing = anyio.CapacityLimiter(concurrency)
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._places.place():
                body = await read_body(Request(scope, receive), timeout_s=self._body_timeout_s)
                await self._reply_while_connected(body, scope, receive, send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            pass

    async def _reply_while_connected(
        self, body: bytearray, scope: Scope, receive: Receive, send: Send
    ) -> None:
        client = Client()
        async with anyio.create_task_group() as group:

            async def stop_when_the_client_leaves() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                client.is_gone.set()
                group.cancel_scope.cancel()

            group.start_soon(stop_when_the_client_leaves)
            try:
                await self._reply(body, client, scope, receive, send)
            finally:
                client.is_gone.set()
            group.cancel_scope.cancel()

    async def _reply(
        self, body: bytearray, client: Client, scope: Scope, receive: Receive, send: Send
    ) -> None:
        has_begun = False

        async def send_reply(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            request = await to_thread.run_sync(self._parse, body, client, limiter=self._parsing)
            body.clear()  # megabytes that are not needed while it waits
            async with self._places.slot(is_search=request.sampling.num_beams > 1):
                await self._answer(request, client, scope, receive, send_reply)
        except Gone:
            pass
        except Exception as error:
            failure = _as_api_error(error)
            if not has_begun:
                await error_response(failure)(scope, receive, send)
            else:  # the status is sent: the protocol reports an error as one more event
                await send({"type": "http.response.body", "body": event(failure.body)})

    def _parse(self, body: bytearray, client: Client) -> ChatRequest:
        return parse_request(
            body,
            self._engine,
            model_id=self._model_id,
            defaults=self._defaults,
            check=client.check,
        )

    def _begin(self, request: ChatRequest, client: Client) -> Stream:
        """Decode the pictures, one by one while the client is connected, and start the answer."""
        pictures = []
        for image in request.images:
            client.check()
            pictures.append(self._engine.processor.pixel_values([image]))
        return self._engine.stream(
            request.messages,
            torch.cat(pictures) if pictures else [],
            request.sampling,
            cancel=client.is_gone,
        )

    async def _answer(
        self, request: ChatRequest, client: Client, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            stream = await to_thread.run_sync(self._begin, request, client)
        except OutOfMemory:
            raise
        except (ValueError, OSError) as error:  # the request's fault; later errors are the server's
            raise ApiError(400, str(error)) from error
        with stream:
            completion = Completion(request, self._model_id, stream)
            if request.is_stream:
                await self._send_events(completion, send)
            else:
                pieces = [piece async for piece in completion.pieces()]
                text = "".join(piece.text for piece in pieces if not piece.is_thinking)
                await JSONResponse(completion.whole(text))(scope, receive, send)

    async def _send_events(self, completion: Completion, send: Send) -> None:
        async def body(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await body(completion.chunk({"role": "assistant", "content": ""}))
        async for piece in completion.pieces():
            field = "reasoning_content" if piece.is_thinking else "content"
            await body(completion.chunk({field: piece.text}))
        await body(completion.chunk({}, finish_reason=completion.finish_reason))
        if completion.request.with_usage:
            await body(completion.usage_chunk())
        await body(DONE, more=False)


class RequireKey:
    """Middleware: every request must carry the key, if there is one."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app = app
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._expected is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "incorrect API key provided", code="invalid_api_key")
                return await error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)


def _model_routes(model_id: str, *, created_s: int) -> list[Route]:
    """`/v1/models`: the list of the one model, and the model by its name."""
    model = {
        "id": model_id,
        "object": "model",
        "created": created_s,
        "owned_by": "minimind-v",
    }

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name == model_id:
            return JSONResponse(model)
        return error_response(ApiError(404, f"no model {name[:100]!r}", code="model_not_found"))

    return [Route("/v1/models", models), Route("/v1/models/{name:path}", one_model)]


async def _http_error(_request: Request, error: HTTPException) -> Response:
    response = error_response(ApiError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


def create_app(
    engine: VLMEngine,
    defaults: Sampling,
    *,
    concurrency: int = 2,
    queue: int = 64,
    api_key: str | None = None,
    hosts: Collection[str] = (ANY,),
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> Starlette:
    """The server's application.

    Args:
        defaults: sampling settings that a request does not name.
        concurrency: answers at once. queue: requests that may wait beside them.
        api_key: required as `Authorization: Bearer`; None requires none.
        hosts: names of this server, from `allowed_hosts`; others are refused.
        body_timeout_s: for the whole body of a request to arrive.
    """
    model_id = engine.path.stem if engine.path.is_file() else engine.path.resolve().name
    chat = ChatCompletions(
        engine,
        model_id=model_id,
        defaults=defaults,
        concurrency=concurrency,
        queue=queue,
        body_timeout_s=body_timeout_s,
    )
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            *_model_routes(model_id, created_s=int(engine.path.stat().st_mtime)),
        ],
        middleware=[
            Middleware(KnownHosts, hosts, refuse=lambda m: error_response(ApiError(403, m))),
            Middleware(RequireKey, api_key=api_key),
        ],
        exception_handlers={HTTPException: _http_error},
    )


def serve_api(
    engine: VLMEngine,
    defaults: Sampling,
    *,
    host: str,
    port: int,
    concurrency: int,
    queue: int,
    api_key: str | None,
) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status.

    Args:
        port: 0 takes a free one. concurrency, queue, api_key: as of `create_app`.
    Raises:
        OSError: the address is taken or not this machine's.
    """
    app = create_app(
        engine,
        defaults,
        concurrency=concurrency,
        queue=queue,
        api_key=api_key,
        hosts=allowed_hosts(host),
    )
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # it repeats the address
        raise OSError(f"cannot listen at {host}:{port}: {reason}; try another --port") from error
    name = f"[{host}]" if ":" in host else host
    print(f"serving http://{name}:{listener.getsockname()[1]}/v1 (Ctrl-C ends it)", flush=True)
    config = server_config(
        app,
        max_connections=concurrency + queue + IDLE_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0
