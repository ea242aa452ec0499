"""Offers a local HTTP server of shards that answers as a plain web server and as Hugging Face do,
and misbehaves on demand."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = "datasets/user/name"


class ShardServer:
    """`files[name]` is what it holds, at `url/name` and at `hf://datasets/user/name/name`.

    gone: names that answer 404, and how often. busy: the same with 503. cuts: bytes after which
    answers break off, one after the other. slow_s: seconds before each answer. requests: the
    method, name and range of each request for a file.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files = dict(files)
        self.gone: dict[str, int] = {}
        self.busy: dict[str, int] = {}
        self.cuts: dict[str, list[int]] = {}
        self.slow_s = 0.0
        self.has_ranges = True
        self.requests: list[tuple[str, str, str | None]] = []
        server = self

        class Handler(_Handler):
            owner = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients are killed in these tests
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def __enter__(self) -> "ShardServer":
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ShardServer

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        """`paths-info` of the hub."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = [n for n in self.owner.files if n in unquote(body) and not self.is_gone(n)]
        self.send(200, json.dumps([self.entry(name) for name in names]).encode())

    def answer(self) -> None:
        time.sleep(self.owner.slow_s)
        place = unquote(urlsplit(self.path).path).strip("/")
        if place.startswith(f"api/{REPO}/tree"):
            self.send(200, json.dumps([self.entry(n) for n in self.owner.files]).encode())
        elif place.startswith(f"api/{REPO}"):
            self.send(200, json.dumps({"id": "user/name", "sha": "c" * 40}).encode())
        else:
            self.file(place.rpartition("/")[2])

    def entry(self, name: str) -> dict:
        data = self.owner.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": tag_of(data)[:40]}

    def is_gone(self, name: str) -> bool:
        left = self.owner.gone.get(name, 0)
        self.owner.gone[name] = max(0, left - 1)
        return left > 0

    def file(self, name: str) -> None:
        wanted = self.headers.get("Range") if self.owner.has_ranges else None
        self.owner.requests.append((self.command, name, wanted))
        if name not in self.owner.files or self.is_gone(name):
            self.send(404, b"")
            return
        if self.owner.busy.get(name, 0) > 0:
            self.owner.busy[name] -= 1
            self.send(503, b"")
            return
        whole = self.owner.files[name]
        start, end = 0, len(whole)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last) + 1, len(whole))
        data = whole[start:end]
        cuts = self.owner.cuts.get(name)
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        headers = {"ETag": f'"{tag_of(whole)}"'}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(whole)}"
        self.send(206 if wanted else 200, data, cut=cut, **headers)

    def send(self, status: int, data: bytes, *, cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        self.close_connection = cut is not None


def tag_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
