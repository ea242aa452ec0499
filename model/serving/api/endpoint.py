"""Owns answering one request: from its body to its last byte, while its client is connected."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import torch
from anyio import to_thread
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from model.generation.stream import Streams
from model.machine.device import OutOfMemory
from model.serving.api.body import read_body
from model.serving.api.metrics import Metrics
from model.serving.api.places import Client, Gone, Places
from model.serving.api.protocol.fields import ApiError
from model.serving.api.protocol.reply import DONE, Reply, event
from model.serving.api.protocol.request import Asked, ChatRequest, Request, TextRequest

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
    if isinstance(error, TimeoutError):  # it waited too long for room in the batch
        return ApiError(503, str(error))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed on this request ({type(error).__name__})")


@dataclass(frozen=True)
class Service:
    """What all endpoints of a server share.

    Args:
        preparing: how many bodies are parsed, or pictures decoded, at once.
    """

    asked: Asked
    places: Places
    preparing: anyio.CapacityLimiter
    metrics: Metrics
    body_timeout_s: float


class Endpoint:
    """An ASGI application that answers requests of one kind.

    Args:
        parse: of `protocol.request`. reply: the kind of their replies.
    """

    def __init__(self, service: Service, parse: Callable[..., Request], reply: type[Reply]):
        self._service, self._parse_body, self._reply_kind = service, parse, reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timeout_s = self._service.body_timeout_s
        try:
            with self._service.places.place():
                body = await read_body(HttpRequest(scope, receive), timeout_s=timeout_s)
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
            limiter = self._service.preparing
            request = await to_thread.run_sync(self._parse, body, client, limiter=limiter)
            body.clear()  # megabytes that are not needed while it waits
            async with self._service.places.slot(is_large=request.is_large):
                await self._answer(request, client, scope, receive, send_reply)
        except Gone:
            pass
        except Exception as error:
            failure = _as_api_error(error)
            if not has_begun:
                await error_response(failure)(scope, receive, send)
            else:  # the status is sent: the protocol reports an error as one more event
                await send({"type": "http.response.body", "body": event(failure.body)})

    def _parse(self, body: bytearray, client: Client) -> Request:
        return self._parse_body(body, self._service.asked, check=client.check)

    async def _answer(
        self, request: Request, client: Client, scope: Scope, receive: Receive, send: Send
    ) -> None:
        asked, metrics = self._service.asked, self._service.metrics
        limiter = self._service.preparing
        try:
            streams = await to_thread.run_sync(_begin, request, asked, client, limiter=limiter)
        except OutOfMemory:
            raise
        except (ValueError, OSError) as error:  # the request's fault; later errors are the server's
            raise ApiError(400, str(error)) from error
        reply = self._reply_kind(request, streams, asked.engine, model_id=asked.model_id)
        try:
            with streams, metrics.first_text(scope) as text_came:
                if request.is_stream:
                    await _send_events(reply, text_came, send)
                else:
                    async for _ in reply.written():
                        text_came()
                    client.check()  # a cut answer is nobody's
                    whole = await to_thread.run_sync(reply.whole)
                    await JSONResponse(whole)(scope, receive, send)
        finally:
            metrics.tokens(reply.usage)


def _begin(request: Request, asked: Asked, client: Client) -> Streams:
    """Decode the pictures, one by one while the client is connected, and start the answers."""
    options: dict[str, Any] = {"num_choices": request.num_choices, "cancel": client.is_gone}
    if isinstance(request, TextRequest):
        return asked.engine.complete(request.prompts, request.sampling, **options)
    assert isinstance(request, ChatRequest)
    pictures = []
    for image in request.images:
        client.check()
        pictures.append(asked.engine.processor.pixel_values([image]))
    images = torch.cat(pictures) if pictures else []
    return asked.engine.choices(request.messages, images, request.sampling, **options)


async def _send_events(reply: Reply, text_came: Callable[[], None], send: Send) -> None:
    async def body(data: bytes, *, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for data in reply.first_chunks():
        await body(data)
    async for written in reply.written():
        text_came()
        await body(reply.chunk(written))
    for data in reply.last_chunks():
        await body(data)
    if reply.request.with_usage:
        await body(reply.usage_chunk())
    await body(DONE, more=False)
