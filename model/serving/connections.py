"""Owns when a connection that nothing happens on is closed."""

import asyncio

HEAD_S = 30  # for a request's head; uvicorn itself closes only after an answer, not before one


def close_when_idle(config, *, head_s: float = HEAD_S) -> None:
    """Make a uvicorn server close connections on which no request arrives whole.

    Args:
        config: of the server, loaded; it makes a protocol for each connection to come.
    """
    config.http_protocol_class = _impatient(config.http_protocol_class, head_s)


def _impatient(protocol: type, head_s: float) -> type:
    class Impatient(protocol):
        """Looks every `head_s` whether a request has begun since, or still runs."""

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._seen, self._timer = None, None
            self._look_later()

        def _look_later(self) -> None:
            self._timer = asyncio.get_running_loop().call_later(head_s, self._look)

        def _look(self) -> None:
            is_running = self.cycle is not None and not self.cycle.response_complete
            if not is_running and self.cycle is self._seen:
                self.transport.close()
            else:
                self._seen = self.cycle
                self._look_later()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

    return Impatient
