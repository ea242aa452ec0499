"""Owns what `/metrics` tells to Prometheus: requests, tokens, the queue and latency.

minimind_requests_total{endpoint, status}    answered, or left by their client (status 499)
minimind_request_seconds{endpoint}           until the end of the answer: a histogram
minimind_first_text_seconds{endpoint}        until its first text
minimind_prompt_tokens_total, minimind_generated_tokens_total
minimind_requests_running, minimind_requests_waiting
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.serving.api.places import Places
from model.serving.api.protocol.fields import ApiError

GONE = 499  # nginx's status of a request whose client left before the answer
START = "minimind.start"  # in a request's ASGI scope
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def _library() -> ModuleType:
    try:
        import prometheus_client
    except ImportError:
        raise ApiError(
            501, "/metrics needs a library: run `pip install prometheus_client` at the server"
        ) from None
    return prometheus_client


class Metrics:
    """Counts, in a registry of its own; without the library nothing is counted.

    Args:
        places: of the server, whose queue is told.
        endpoints: paths that are told apart; all others are one, "other".
    """

    def __init__(self, places: Places, endpoints: tuple[str, ...]):
        self._endpoints = endpoints
        try:
            library = _library()
        except ApiError:
            self._registry: Any = None
            return
        self._registry = own = library.CollectorRegistry()
        by, where = ["endpoint", "status"], ["endpoint"]
        self._requests = library.Counter("minimind_requests", "Requests.", by, registry=own)
        self._seconds, self._first = (
            library.Histogram(f"minimind_{name}", told, where, buckets=SECONDS, registry=own)
            for name, told in (
                ("request_seconds", "Until the end of the answer."),
                ("first_text_seconds", "Until the first text of the answer."),
            )
        )
        self._prompt, self._generated = (
            library.Counter(f"minimind_{name}_tokens", f"Tokens, {name}.", registry=own)
            for name in ("prompt", "generated")
        )
        for name, value in (
            ("running", lambda: places.num_running),
            ("waiting", lambda: places.num_waiting),
        ):
            told = f"Requests that are {name}."
            library.Gauge(f"minimind_requests_{name}", told, registry=own).set_function(value)

    def page(self, _request: Request) -> Response:
        """What Prometheus reads; raises `ApiError` without the library."""
        library = _library()
        if self._registry is None:
            raise ApiError(501, "prometheus_client was installed later: start the server again")
        text = library.generate_latest(self._registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def request(self, path: str, *, status: int, seconds: float) -> None:
        """A request has ended."""
        if self._registry is None:
            return
        endpoint = path if path in self._endpoints else "other"
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def tokens(self, usage: Mapping[str, int]) -> None:
        """An answer has ended, by itself or cut."""
        if self._registry is not None:
            self._prompt.inc(usage["prompt_tokens"])
            self._generated.inc(usage["completion_tokens"])

    @contextmanager
    def first_text(self, scope: Scope) -> Iterator[Callable[[], None]]:
        """Within it, the first call of what it yields is told as the request's first text."""
        is_told = self._registry is None

        def tell() -> None:
            nonlocal is_told
            if not is_told:
                is_told = True
                self._first.labels(scope["path"]).observe(time.monotonic() - scope[START])

        yield tell


class Counted:
    """ASGI middleware: tells `Metrics` of every request, also of refused ones."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope[START], status = time.monotonic(), GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            seconds = time.monotonic() - scope[START]
            self._metrics.request(scope["path"], status=status, seconds=seconds)
