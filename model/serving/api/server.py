"""Owns the OpenAI-compatible server: `python web_demo.py --api`.

    POST /v1/chat/completions   text and pictures (data URLs), whole or streamed
    POST /v1/completions        texts that go on from a prompt
    GET  /v1/models
    GET  /health                without a key
    GET  /metrics               for Prometheus

Requests run at once, decoded in one batch; of beam searches and requests for several answers, which
are not, one at most. The others wait in a queue. A client that disconnects, or keeps the server
waiting too long, frees its place.
"""

import hmac
import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from model.generation.batch import ROWS
from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling
from model.serving.api.body import BODY_TIMEOUT_S
from model.serving.api.connection import server_config
from model.serving.api.endpoint import Endpoint, Service, error_response
from model.serving.api.metrics import Counted, Metrics
from model.serving.api.places import Places
from model.serving.api.protocol.fields import ApiError
from model.serving.api.protocol.reply import ChatReply, TextReply
from model.serving.api.protocol.request import Asked, parse_chat, parse_text
from model.serving.hosts import ANY, KnownHosts, allowed_hosts
from model.weights.file_names import name_without_size

IDLE_CONNECTIONS = 128  # in addition to one for each place
PREPARED_AT_ONCE = 2  # bodies that are parsed, and pictures that are decoded
CHAT, TEXT, HEALTH, METRICS = "/v1/chat/completions", "/v1/completions", "/health", "/metrics"
DEFAULT_NAME = "default"  # every server's model answers to it


class RequireKey:
    """Middleware: every request but one for `/health` must carry the key, if there is one."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app = app
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_asked = self._expected is not None and scope.get("path") != HEALTH
        if scope["type"] == "http" and is_asked:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "incorrect API key provided", code="invalid_api_key")
                return await error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)


def served_names(path: Path) -> list[str]:
    """What a weight's model answers to: its own name first, without its size, `default`."""
    name = path.stem if path.is_file() else path.resolve().name
    return list(dict.fromkeys([name, name_without_size(name), DEFAULT_NAME]))


def check_origins(origins: Sequence[str]) -> None:
    """Raises ValueError where one is no origin of a web page, as browsers send it."""
    for origin in origins:
        parts = urlsplit(origin)
        is_origin = (
            parts.scheme in ("http", "https") and origin == f"{parts.scheme}://{parts.netloc}"
        )
        if origin != ANY and not (is_origin and parts.netloc):
            raise ValueError(
                f"--cors {origin} is no origin: give scheme, name and port without a path, such as "
                "http://localhost:3000, or * for any page"
            )


def _model_routes(names: Sequence[str], *, created_s: int) -> list[Route]:
    """`/v1/models`: the list of the one model, and the model by its names."""
    model = {
        "id": names[0],
        "object": "model",
        "created": created_s,
        "owned_by": "minimind-v",
    }

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name in names:
            return JSONResponse(model)
        return error_response(ApiError(404, f"no model {name[:100]!r}", code="model_not_found"))

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": names[0]})

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route(HEALTH, health),
    ]


async def _http_error(_request: Request, error: HTTPException) -> Response:
    response = error_response(ApiError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _api_error(_request: Request, error: ApiError) -> Response:
    return error_response(error)


def create_app(
    engine: VLMEngine,
    defaults: Sampling,
    *,
    concurrency: int = ROWS,
    queue: int = 64,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    hosts: Collection[str] = (ANY,),
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> Starlette:
    """The server's application.

    Args:
        defaults: sampling settings that a request does not name.
        concurrency: answers at once, in one batch. queue: requests that may wait beside them.
        api_key: required as `Authorization: Bearer`; None requires none.
        origins: of web pages that may ask from a browser (CORS); `*`: of any.
        hosts: names of this server, from `allowed_hosts`; others are refused.
        body_timeout_s: for the whole body of a request to arrive.
    """
    names = served_names(engine.path)
    places = Places(concurrency=concurrency, queue=queue)
    metrics = Metrics(places, (CHAT, TEXT))
    service = Service(
        asked=Asked(engine.batched(concurrency), names, defaults),
        places=places,
        preparing=anyio.CapacityLimiter(PREPARED_AT_ONCE),
        metrics=metrics,
        body_timeout_s=body_timeout_s,
    )
    cross_origin = {"allow_origins": origins, "allow_methods": ["GET", "POST"]}
    return Starlette(
        routes=[
            Route(CHAT, Endpoint(service, parse_chat, ChatReply), methods=["POST"]),
            Route(TEXT, Endpoint(service, parse_text, TextReply), methods=["POST"]),
            *_model_routes(names, created_s=int(engine.path.stat().st_mtime)),
            Route(METRICS, metrics.page),
        ],
        middleware=[
            Middleware(Counted, metrics),
            Middleware(KnownHosts, hosts, refuse=lambda m: error_response(ApiError(403, m))),
            *([Middleware(CORSMiddleware, **cross_origin, allow_headers=["*"])] if origins else []),
            Middleware(RequireKey, api_key=api_key),
        ],
        exception_handlers={HTTPException: _http_error, ApiError: _api_error},
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
    origins: Sequence[str] = (),
) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status.

    Args:
        port: 0 takes a free one. concurrency, queue, api_key, origins: as of `create_app`.
    Raises:
        ValueError: `origins` holds what is none.
        OSError: the address is taken or not this machine's.
    """
    check_origins(origins)
    app = create_app(
        engine,
        defaults,
        concurrency=concurrency,
        queue=queue,
        api_key=api_key,
        origins=origins,
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
