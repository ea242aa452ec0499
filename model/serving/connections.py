"""Owns closing idle connections of the web page's server."""

import asyncio
from typing import Any

import uvicorn

HEAD_S = 30  # for a request's head; uvicorn itself closes a connection only after its first answer


def close_when_idle(config: uvicorn.Config, *, head_s: float = HEAD_S) -> None:
    """Make a uvicorn server close connections on which no complete request arrives.

    Args:
        config: of the server, loaded already; future connections use its protocol class.
    """
    config.http_protocol_class = _impatient(config.http_protocol_class, head_s)


def _impatient(protocol: Any, head_s: float) -> type:
    class Impatient(protocol):
        """Closes itself if between two checks, `head_s` apart, no request begins or runs."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._seen_cycle = None  # uvicorn's object for a request and its answer
            self._check_later()

        def _check_later(self) -> None:
            self._timer = asyncio.get_running_loop().call_later(head_s, self._check)

        def _check(self) -> None:
            is_running = self.cycle is not None and not self.cycle.response_complete
            if not is_running and self.cycle is self._seen_cycle:
                self.transport.close()
            else:
                self._seen_cycle = self.cycle
                self._check_later()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

    return Impatient
