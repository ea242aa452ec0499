"""Offers clients of the API that the official one cannot play: slow, broken, or gone before the
answer.
"""

import http.client
import json
import socket
import time

from support.api_site import TIMEOUT_S

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
)


def connect(address: str, *, receive_bytes: int | None = None) -> socket.socket:
    """A plain connection; `receive_bytes` is what its system takes without its reading."""
    host, _, port = address.removeprefix("http://").removesuffix("/v1").rpartition(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(TIMEOUT_S)
    connection.connect((host, int(port)))
    return connection


def whole(body: dict | bytes) -> bytes:
    """A whole request with this body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def read_reply(connection: socket.socket, *, method: str = "POST") -> tuple[int, bytes]:
    """Status and body of one reply; to a HEAD it has none.

    Raises:
        http.client.HTTPException, OSError: the server closed the connection without one.
    """
    reply = http.client.HTTPResponse(connection, method=method)
    reply.begin()
    return reply.status, reply.read()


def is_closed(connection: socket.socket, *, within_s: float) -> bool:
    """Whether the server ends the connection; what it still sends is read."""
    deadline = time.monotonic() + within_s
    while (left := deadline - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            if not connection.recv(65536):
                return True
        except TimeoutError:
            return False
        except ConnectionError:
            return True
    return False


def eventually(is_so, *, within_s: float = 60) -> bool:
    """Whether something comes to be so in time."""
    deadline = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
