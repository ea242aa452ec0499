"""Offers malformed requests to the API, generated from a seed: valid requests with one part made
wrong.
"""

import base64
import contextlib
import copy
import http.client
import io
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image
from support.api_site import malformed, question
from support.api_socket import chunk, connect, read_reply

PATH = "/v1/chat/completions"
DEPTH = 50_000
GRACE_S = 0.3  # for what is not whole: long enough for a server to fall over it
STRINGS = ("", "\0", "\ud800", "\udc00x", "<image>", "<|im_end|>", "<|im_start|>system", "@" * 64,
           "\u202e\u0007", "😀" * 300, "a" * 20_000, "../../etc/passwd", "%s%n{0}",
           "__proto__")  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, 5e-324)
OTHERS = (None, True, False, [], {}, [[]], [None], {"": None}, {"type": "text"}, {"url": 1})
LITERALS = (b"NaN", b"-Infinity", b"1e999", b"-1e999", b"1" * 5000, b"0x10", b"01", b"1.", b"'a'",
            b"[" * DEPTH, b'{"a":' * DEPTH, b'"\\ud800\\ud800"', b'"\\x00"', b'"\xff\xfe"', b"\0",
            b"[" * 900 + b"]" * 900, b"/*c*/1", b"1,", b"")  # fmt: skip
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "PPM", "TGA", "JPEG2000")
METHODS = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT", "post", "A" * 99)
PATHS = ("/", "/v1", "/v1/", PATH + "/", "/v1/models/%00", "/v1/models/" + "a" * 9000,
         "/v1/models/..%2f..%2fetc%2fpasswd", "/../" * 50, "//evil/", "/v1/models?" + "a=1&" * 500,
         "/%ff%fe", "/v1/completions", "*", "http://evil.example/")  # fmt: skip
KINDS = ("text/plain", "", "application/json; charset=utf-16", "multipart/form-data", "\xff",
         "application/x-www-form-urlencoded", "application/json" * 100)  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """One request as its bytes; where it is not whole, the server rightly waits for the rest."""

    kind: str
    data: bytes
    is_whole: bool = True


def valid_body(rng: random.Random) -> dict:
    """A request that is answered in a few tokens."""
    picture = Image.new("RGB", (rng.randint(8, 40), rng.randint(8, 40)), "red")
    content = rng.choice([("What?",), (picture, "What?"), (picture, picture, "And?")])
    body = question(
        *content, max_tokens=rng.randint(1, 3), temperature=0.5, top_p=0.9, seed=1, stop=["x", "yy"]
    )
    if rng.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if rng.random() < 0.5:
        past = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello."},
        ]
        body["messages"] = past + body["messages"]
    return body


def _places(node, found: list | None = None) -> list[tuple]:
    """Every (container, key) below a node."""
    found = [] if found is None else found
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        found.append((node, key))
        if isinstance(value, dict | list):
            _places(value, found)
    return found


def wrong_value(rng: random.Random) -> bytes:
    """One to three fields of another type, value or name, or gone, or there twice."""
    body = valid_body(rng)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(_places(body) or [(body, "model")])
        act = rng.randrange(5)
        if act == 0:
            del container[key]
        elif act == 1 and isinstance(container, dict):
            container[rng.choice(STRINGS)[:200]] = container.pop(key)
        elif act == 2 and isinstance(container, list):
            container += [copy.deepcopy(container[key])] * rng.choice([1, 5, 200, 1100])
        else:
            container[key] = copy.deepcopy(rng.choice(rng.choice([STRINGS, NUMBERS, OTHERS])))
    return json.dumps(body).encode()


def wrong_literal(rng: random.Random) -> bytes:
    """A value that is no JSON, or hardly."""
    body = valid_body(rng)
    container, key = rng.choice(_places(body))
    container[key] = "HERE"
    return json.dumps(body).encode().replace(b'"HERE"', rng.choice(LITERALS), 1)


def wrong_bytes(rng: random.Random) -> bytes:
    """Bytes changed, cut, doubled or put in."""
    data = bytearray(json.dumps(valid_body(rng)).encode())
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data))
        piece = rng.choice([b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"{", b"[", b",", b"\\"])
        act = rng.randrange(4)
        if act == 0:
            data[at] = rng.randrange(256)
        elif act == 1:
            data[at:at] = piece * rng.choice([1, 1, 1000])
        elif act == 2:
            data[at:at] = data[at : at + rng.randint(1, 100)]
        else:
            del data[at : at + rng.randint(1, 20)]
    return bytes(data)


def wrong_picture(rng: random.Random) -> bytes:
    """A picture that is cut, changed, of another kind, or none."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "blue").save(buffer, format=rng.choice(FORMATS))
    data = bytearray(buffer.getvalue())
    if rng.random() < 0.5:
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.randint(0, 10)):
        if data:
            data[rng.randrange(min(len(data), 100))] = rng.randrange(256)
    if rng.random() < 0.1:
        data = bytearray(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    text = base64.b64encode(data).decode()
    if rng.random() < 0.2:
        text = rng.choice([text[:-1], text + "=", text[::-1], text.replace("A", "*"), text + "\n"])
    head = rng.choice(
        ["data:image/png;base64,"] * 5 + ["data:image/png,", "data:;base64,", "file:"]
    )
    body = question("What?", max_tokens=2)
    body["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": head + text}})
    return json.dumps(body).encode()


def too_much(rng: random.Random) -> bytes:
    """More than is taken, of anything."""
    body = question("What?", max_tokens=2)
    act = rng.randrange(7)
    if act == 0:
        body["messages"] *= rng.choice([1001, 20_000])
    elif act == 1:
        body["messages"][0]["content"] *= rng.choice([101, 20_000])
    elif act == 2:
        body["messages"][0]["content"] = "circle " * 2_000_000
    elif act == 3:
        body["stop"] = rng.choice([["a" * 257], "ab" * 800_000, ["a"] * 100_000])
    elif act == 4:
        return b'{"metadata": [' + b"{}," * rng.choice([600_000, 3_000_000]) + b"{}]}"
    elif act == 5:
        body["messages"][0]["content"] = "<image>" * 100_000
    else:
        return b" " * (21 * 2**20)
    return json.dumps(body).encode()


BODIES: tuple[Callable[[random.Random], bytes], ...] = (
    malformed, wrong_value, wrong_value, wrong_literal, wrong_bytes, wrong_picture,
)  # fmt: skip


def http_request(method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def wrong_http(rng: random.Random) -> Attack:
    """A good body in a request that is none, or another one."""
    body = json.dumps(valid_body(rng)).encode()
    host, kind = ("Host", "127.0.0.1"), ("Content-Type", "application/json")
    length = ("Content-Length", str(len(body)))
    good = [host, kind, length]
    choice = rng.randrange(8)
    if choice == 0:
        return Attack("method", http_request(rng.choice(METHODS), PATH, good, body))
    if choice == 1:
        return Attack(
            "path", http_request(rng.choice(["GET", "POST"]), rng.choice(PATHS), good, body)
        )
    if choice == 2:
        headers = [host, ("Content-Type", rng.choice(KINDS)), length]
        return Attack("type", http_request("POST", PATH, headers, body))
    if choice == 3:
        wrong = rng.choice(["-1", "0", "1", "9" * 30, "abc", "", "1e3", str(len(body) + 50)])
        headers = [host, kind, ("Content-Length", wrong)]
        return Attack("length", http_request("POST", PATH, headers, body), is_whole=False)
    if choice == 4:
        extra = rng.choice(
            [
                [("X", "a" * 200_000)],
                [(f"X{i}", "a") for i in range(5000)],
                [host],
                [("X\0", "a")],
                [("X", "a\nb: c")],
                [("Expect", "100-continue")],
                [("Upgrade", "websocket"), ("Connection", "Upgrade")],
                [("Authorization", "Bearer \xff")],
                [length],
            ]
        )
        return Attack("headers", http_request("POST", PATH, good + extra, body))
    if choice == 5:
        names = (
            [],
            [("Host", "evil.example")],
            [("Host", "127.0.0.1.evil.example:80")],
            [("Host", "")],
            [("Host", "[::1")],
        )
        return Attack("host", http_request("POST", PATH, [*rng.choice(names), kind, length], body))
    if choice == 6:
        return Attack("noise", rng.randbytes(rng.randint(1, 3000)) + b"\r\n\r\n", is_whole=False)
    cut = rng.randrange(len(body))
    return Attack("cut", http_request("POST", PATH, good, body[:cut]), is_whole=False)


def chunked(rng: random.Random, body: bytes) -> Attack:
    """A body in chunks, of which one may be wrong."""
    step = max(1, len(body) // rng.randint(1, 200))
    pieces = [chunk(body[i : i + step]) for i in range(0, len(body), step)] + [b"0\r\n\r\n"]
    is_whole = True
    if rng.random() < 0.5:
        wrong = rng.choice(
            [
                b"-1\r\na\r\n",
                b"zz\r\na\r\n",
                b"FFFFFFFFFFFFFFFFFF\r\na\r\n",
                b"\r\n",
                b"1;" + b"x" * 70_000 + b"\r\na\r\n",
                b"5\r\na\r\n",
                b"",
            ]
        )
        pieces[rng.randrange(len(pieces))] = wrong
        is_whole = False
    headers = [
        ("Host", "127.0.0.1"),
        ("Content-Type", "application/json"),
        ("Transfer-Encoding", "chunked"),
    ]
    if rng.random() < 0.2:
        headers.append(("Content-Length", "5"))
    return Attack("chunks", http_request("POST", PATH, headers, b"".join(pieces)), is_whole)


def attacks(seed: int) -> Iterator[Attack]:
    """Without end; the same seed gives the same ones."""
    rng = random.Random(seed)
    headers = [("Host", "127.0.0.1"), ("Content-Type", "application/json")]
    while True:
        kind = rng.random()
        if kind < 0.15:
            yield wrong_http(rng)
            continue
        make = too_much if kind < 0.2 else rng.choice(BODIES)
        body = make(rng)
        if kind > 0.9:
            yield chunked(rng, body)
        else:
            length = [("Content-Length", str(len(body)))]
            yield Attack(make.__name__, http_request("POST", PATH, headers + length, body))


def send(address: str, attack: Attack) -> tuple[int, bytes, float]:
    """Status (0 where the server closed without one), body and seconds of one attack."""
    start = time.monotonic()
    with connect(address) as connection:
        with contextlib.suppress(ConnectionError):  # it may have heard enough
            connection.sendall(attack.data)
        if not attack.is_whole:
            connection.settimeout(GRACE_S)
        try:
            method = attack.data.partition(b" ")[0].decode("latin-1")
            status, body = read_reply(connection, method=method)
        except (http.client.HTTPException, ConnectionError, TimeoutError):
            status, body = 0, b""
    return status, body, time.monotonic() - start
