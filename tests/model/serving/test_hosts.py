"""If this fails, a foreign web site can reach a user's local server by DNS rebinding, or a user's
own address is refused.
"""

import asyncio

import pytest

from model.serving.hosts import KnownHosts, allowed_hosts


def status_of(host: str | None, names: list[str], *, kind: str = "http") -> int:
    """What a request with this `Host` gets; 0 where a websocket was closed."""
    told = []

    async def app(_scope, _receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message) -> None:
        told.append(message)

    headers = [] if host is None else [(b"host", host.encode())]
    scope = {"type": kind, "method": "GET", "path": "/", "headers": headers}
    asyncio.run(KnownHosts(app, names)(scope, None, send))
    return told[0].get("status", 0)


@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_loopback_server_answers_to_its_own_names_alone(bound):
    names = allowed_hosts(bound)
    for host in ("127.0.0.1", "127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860"):
        assert status_of(host, names) == 200, host
    for host in (
        None,
        "",
        ":7860",
        "evil.example",
        "evil.example:7860",
        "127.0.0.1.evil.example",
        "localhost.evil.example:7860",
        "[::1",
        "[::2]:7860",
        "0.0.0.0",
    ):
        assert status_of(host, names) == 403, host
    assert status_of("evil.example", names, kind="websocket") == 0


def test_another_loopback_address_is_a_name_too():
    assert status_of("127.0.0.2:7860", allowed_hosts("127.0.0.2")) == 200


@pytest.mark.parametrize("bound", ["0.0.0.0", "::", "192.168.1.5", "", "box.lan"])
def test_server_that_others_reach_answers_to_any_name(bound):
    assert allowed_hosts(bound) == ["*"]
    assert status_of("box.lan:7860", allowed_hosts(bound)) == 200
