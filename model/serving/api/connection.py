"""Owns how long a connection may keep the server waiting: for a request, a body, or a reader.

uvicorn waits for all of them for ever; only a connection that is idle after an answer is closed.
"""

import asyncio
import socket
from dataclasses import dataclass

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

READ_BYTES = 2**14  # at once: what many tiny chunks cost must not hold up the others
WRITE_BYTES = 2**16  # that may lie here unread; the system would take megabytes
IDLE_AFTER_ANSWER_S = 5


@dataclass(frozen=True)
class Patience:
    """How long, in seconds, the server waits for a client.

    Args:
        head_s: for a whole head of a request, from the connection's or the last answer's time on.
        send_s: for a reader to take what lies there.
    """

    head_s: float = 30
    send_s: float = 30


class PatientProtocol(H11Protocol):
    """uvicorn's connection; one that keeps the server waiting too long is cut off.

    Where there are too many, the one that has waited longest without a request gives way.
    """

    patience: Patience
    max_connections: int
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BYTES)
        transport.max_size = READ_BYTES  # of asyncio's own; another loop's may ignore it
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WRITE_BYTES)
        self._watch_for_head()
        if len(self.connections) > self.max_connections:
            idle = [c for c in self.connections if c._head_timer is not None]
            oldest = min(idle, key=lambda c: c._head_timer.when())
            self.connections.discard(oldest)  # now, not only when its end comes around
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
                self.flow.resume_reading()  # or nobody would see the client leave
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
    app, *, max_connections: int, patience: Patience | None = None, **settings
) -> uvicorn.Config:
    """uvicorn's `Config` of a server that waits no longer than it has patience.

    Args:
        max_connections: idle ones included. settings: of `uvicorn.Config`.
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
