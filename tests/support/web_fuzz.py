"""Offers malformed requests to the page, from a seed: bodies, paths, headers and uploads."""

import copy
import json
import random
from dataclasses import dataclass, field

from support.web_client import MULTIPART, HttpVisitor, form, picture

JSON = "application/json"
LONG = "a" * 9000
ODD_VALUES = (
    None, True, -1, 0, 1.5, 10**18, "", "\0", "a\0b", LONG, "../" * 50, "/etc/passwd", [], {},
    [[[[]]]], {"path": ""}, {"path": LONG}, {"path": "/etc/passwd\0.png"}, {"path": None},
    {"path": "http://127.0.0.1:1/x"}, "\u202e", "<script>", "English", "sft_vlm_32", "%00", "None",
)  # fmt: skip
ODD_TEXTS = (
    b"", b"null", b"[]", b"{}", b"{", b'"', b"\xff\xfe{\x00}\x00", b"\x00" * 50, b"[" * 5000,
    b'{"a":' * 2000, b"NaN", b'{"data":[NaN],"fn_index":0,"session_hash":"a"}',
    b'{"data":[Infinity],"fn_index":3,"session_hash":"a"}', b'{"data":[],"fn_index":1e999}',
    b'{"data":[],"fn_index":' + b"9" * 5000 + b',"session_hash":"a"}', b'{"fn_index":0}',
    b'{"data":["\\ud800"],"fn_index":8,"session_hash":"a"}', "{“data”:[]}".encode(),
    b'{"data":[],"fn_index":9,"session_hash":"a"}' * 2,
)  # fmt: skip
ROUTES = (
    "/run/_ask", "/gradio_api/run/_ask", "/gradio_api/api/_ask", "/gradio_api/call/_ask",
    "/gradio_api/call/v2/_ask", "/call/v2/_ask", "/gradio_api/call/_ask/x", "/gradio_api/cancel",
    "/gradio_api/reset", "/gradio_api/component_server", "/gradio_api/stream/x",
    "/gradio_api/stream/x/close", "/gradio_api/stream/a/b/c/playlist.m3u8", "/monitoring",
    "/monitoring/summary", "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/token",
    "/gradio_api/user", "/gradio_api/app_id", "/gradio_api/dev/reload", "/gradio_api/vibe-edit",
    "/gradio_api/vibe-code", "/gradio_api/process_recording", "/gradio_api/queue/status",
    "/gradio_api/deep_link", "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/runs",
    "/gradio_api/custom_component/x/client/y/z", "/svelte/x", "/static/../../etc/passwd",
    "/assets/../../../etc/passwd", "/assets/", "/manifest.json", "/pwa_icon/9", "/robots.txt",
    "/logout", "/mcp", "/gradio_api/mcp/sse", "/docs", "/openapi.json", "//", "/%00", "/config/",
    "/config?deep_link=../../x", "/?deep_link=%00", "/?page=%ff", "/login/", "/theme.css/x",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS")
ODD_HEADERS = (
    {"Origin": "http://["}, {"Origin": "null"}, {"Origin": "\xff"}, {"Range": "bytes=1-2-3"},
    {"Range": "bytes=9999-1"}, {"Range": "bytes=-"}, {"Cookie": "a" * 4000}, {"Cookie": "=;=;"},
    {"Accept_Encoding": "br;q=x"}, {"Accept_Language": LONG}, {"X_Forwarded_Host": "["},
    {"X_Forwarded_Proto": "a,b"}, {"Content_Type": ""}, {"Content_Type": "multipart/form-data"},
    {"Content_Type": "application/x+json"}, {"Content_Type": "text/plain"},
    {"Access_Control_Request_Method": "POST", "Origin": "http://["},
)  # fmt: skip


@dataclass
class Attack:
    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


def malformed(rng: random.Random, visitor: HttpVisitor) -> Attack:
    """One request that the page would not send."""
    kind = rng.choice((_event, _event, _event, _text, _route, _file, _session, _upload, _login))
    attack = kind(rng, visitor)
    if rng.random() < 0.15:
        attack.headers = attack.headers | rng.choice(ODD_HEADERS)
    return attack


def _event(rng: random.Random, visitor: HttpVisitor) -> Attack:
    """An event of the page in which one or two values are others."""
    event = visitor.question("What?") | {"session_hash": f"fuzz{rng.randrange(20)}"}
    if rng.random() < 0.5:
        event |= {"fn_index": rng.randrange(-1, 16), "data": ["English"] * rng.randrange(12)}
    event = copy.deepcopy(event)
    for _ in range(rng.randrange(1, 3)):
        place, value = event, copy.deepcopy(rng.choice(ODD_VALUES))
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and rng.random() < 0.7:
                place = place[key]
                continue
            place[key] = value
            break
    if rng.random() < 0.1:
        event["event_data"] = {"index": rng.choice(ODD_VALUES), "value": rng.choice(ODD_VALUES)}
    if rng.random() < 0.1:
        event.pop(rng.choice(list(event)))
    return Attack(
        "POST", "/gradio_api/queue/join", json.dumps(event).encode(), {"Content_Type": JSON}
    )


def _text(rng: random.Random, visitor: HttpVisitor) -> Attack:
    body = rng.choice(ODD_TEXTS)
    if rng.random() < 0.3:
        body = bytearray(json.dumps(visitor.question("What?")).encode())
        for _ in range(rng.randrange(1, 20)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        body = bytes(body[: rng.randrange(1, len(body) + 1)])
    kind = rng.choice((JSON, JSON, "Application/JSON", "text/plain", "application/x+json"))
    return Attack("POST", "/gradio_api/queue/join", body, {"Content_Type": kind})


def _route(rng: random.Random, visitor: HttpVisitor) -> Attack:
    body = rng.choice((None, b"{}", json.dumps({"data": [None] * 10}).encode(), *ODD_TEXTS))
    return Attack(rng.choice(METHODS), rng.choice(ROUTES), body, {"Content_Type": JSON})


def _file(rng: random.Random, visitor: HttpVisitor) -> Attack:
    name = rng.choice(
        (
            "/etc/passwd",
            "%00",
            LONG,
            "..%2f" * 40,
            "http://127.0.0.1:1/x",
            "/",
            "~",
            "C:%5Cx",
            "%ff",
            "/proc/self/environ",
            "/tmp/../etc/passwd",
        )
    )
    return Attack(rng.choice(("GET", "HEAD")), f"/gradio_api/file={name}")


def _session(rng: random.Random, visitor: HttpVisitor) -> Attack:
    name = rng.choice(("", "x", "%00", LONG, "a/b", "..", "%ff", "a%20b"))
    place = rng.choice(
        ("heartbeat/", "queue/data?session_hash=", "queue/data?x=", "upload_progress?upload_id=")
    )
    return Attack("GET", f"/gradio_api/{place}{name}")


def _upload(rng: random.Random, visitor: HttpVisitor) -> Attack:
    name = rng.choice(
        ("a.png", "", ".", "..", LONG + ".png", "a/b.png", "..\\x", "\\0", "CON", "é.png")
    )
    content = rng.choice(
        (picture(), b"", b"no picture", picture()[:40], b"%!PS\n(x) show", b"\0" * 500)
    )
    body = form((name, content))
    choice = rng.random()
    if choice < 0.3:
        body = body[: rng.randrange(len(body))]
    elif choice < 0.4:
        body = body.replace(
            b'name="files"', rng.choice((b"", b'name=""', b'name="\0"', b"name=files"))
        )
    elif choice < 0.5:
        body = body.replace(b"filename=", b"file=")
    kinds = (
        MULTIPART,
        MULTIPART,
        MULTIPART,
        "multipart/form-data",
        JSON,
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=other",
    )
    return Attack(
        "POST",
        "/gradio_api/upload" + rng.choice(("", "?upload_id=x", "?upload_id=%00")),
        body,
        {"Content_Type": rng.choice(kinds)},
    )


def _login(rng: random.Random, visitor: HttpVisitor) -> Attack:
    body = rng.choice(
        (
            b"",
            b"username=a&password=b",
            b"username=&password=%ff",
            b"password=x" * 3000,
            b"username[]=a&password=%00",
            b"{}",
            form(("a", b"b")),
        )
    )
    kind = rng.choice(("application/x-www-form-urlencoded", MULTIPART, JSON))
    return Attack("POST", "/login", body, {"Content_Type": kind})
