"""Owns which host names a server answers to: the defence against DNS rebinding.

In that attack, a web page that is open in the user's browser gives its own name the address of this
machine; the browser then lets it talk to the server here. The `Host` header still holds its name.
"""

import ipaddress
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

ANY = "*"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def allowed_hosts(host: str) -> list[str]:
    """The names that a server listening at `host` answers to, in lower case, IPv6 unbracketed.

    A server that only this machine can reach has known names. Another may have any name, given by a
    router or a proxy: `*`; it should ask for a password or key.
    """
    host = host.lower().strip("[]")
    return sorted({*LOOPBACK, host}) if _is_loopback(host) else [ANY]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse(message: str) -> Response:
    return PlainTextResponse(message, status_code=403)


class KnownHosts:
    """ASGI middleware: refuses (403) a request whose `Host` is not among the names.

    Args:
        names: from `allowed_hosts`; `*` allows any.
        refuse: makes the response from a message.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: Collection[str],
        *,
        refuse: Callable[[str], Response] = _refuse,
    ):
        self._app, self._names, self._refuse = app, frozenset(names), refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and ANY not in self._names:
            given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if _name_of(given) not in self._names:
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                    return
                names = ", ".join(sorted(self._names))
                message = (
                    f"this server does not answer to the name {given[:100]!r}, only to {names}; "
                    "a proxy in front of it must send one of these as Host"
                )
                await self._refuse(message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name_of(header: str) -> str | None:
    """The name in a `Host` header without its port; None where there is none."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None
