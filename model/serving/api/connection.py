"""Owns the time limits of a connection: for a request's head, and for the client to read.

uvicorn itself has a limit only for a connection that is idle after an answer.
"""

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

READ_BYTES = 2**14  # at once: parsing many tiny chunks must not block other connections
WRITE_BYTES = 2**16  # buffered for a slow reader; the system's default is megabytes
IDLE_AFTER_ANSWER_S = 5


@dataclass(frozen=True)
class Patience:
    """Time limits in seconds.

    Args:
        head_s: for a whole request head, counted from the connection or the last answer.
        send_s: for the client to read what is buffered for it.
    """

    head_s: float = 30
    send_s: float = 30


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP protocol; it closes a connection that exceeds a time limit.

    Beyond `max_connections`, the connection that has been longest without a request is closed.
    """

    patience: Patience
    max_connections: int
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BYTES)
        transport.max_size = READ_BYTES  # asyncio's attribute; another loop may ignore it
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WRITE_BYTES)
        self._watch_for_head()
        if len(self.connections) > self.max_connections:
            idle = [c for c in self.connections if c._head_timer is not None]
            oldest = min(idle, key=lambda c: c._head_timer.when())
            self.connections.discard(oldest)  # now: `connection_lost` comes later
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer("_head_timer")
        self._stop_timer("_send_timer")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_answering and not self.cycle.more_body:
            self.cycle.keep_alive = False  # a second request before the first answer: dropped
            return
        super().data_received(data)
        if self._is_answering:
            self._stop_timer("_head_timer")
            if self.conn.trailing_data[0]:
                self.cycle.keep_alive = False
                self.flow.resume_reading()  # or a disconnect would go unnoticed
        else:
            self._watch_for_head()

    def on_response_complete(self) -> None:
        self._watch_for_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(self.patience.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_timer("_send_timer")
        super().resume_writing()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_for_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.patience.head_s, self.transport.abort)

    def _stop_timer(self, name: str) -> None:
        if (timer := getattr(self, name)) is not None:
            timer.cancel()
            setattr(self, name, None)


def server_config(
    app: ASGIApp, *, max_connections: int, patience: Patience | None = None, **settings: Any
) -> uvicorn.Config:
    """uvicorn's `Config` of a server whose connections have these time limits.

    Args:
        max_connections: idle ones included.
        settings: further ones of `uvicorn.Config`.
    """
    fields = {"patience": patience or Patience(), "max_connections": max_connections}
    return uvicorn.Config(
        app,
        http=type("Protocol", (PatientProtocol,), fields),
        loop="asyncio",
        ws="none",
        log_level="warning",
        timeout_keep_alive=IDLE_AFTER_ANSWER_S,
        **settings,
    )
