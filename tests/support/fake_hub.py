"""Offers a local HTTP server that answers as Hugging Face, ModelScope and GitHub do, and its
fixtures.

It keeps what was asked, and misbehaves on demand. It listens on 127.0.0.1 alone, and a test that
uses it can reach no other address.
"""

import gzip
import hashlib
import json
import random
import socket
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session
from support.hub_uploads import UploadRequests, Uploads

from dataset import download
from dataset.fetching import assets as manifest
from dataset.fetching import hub as network

COMMIT = "c" * 40  # what a branch stands for
LARGE = (".pth", ".parquet", ".zip", ".safetensors", ".bin", ".gguf", ".onnx")  # kept by Git LFS

PARQUET = random.Random(0).randbytes(300_000)
CONFIG = b'{"model_type": "clip"}\n'
DATA = manifest.DATA[0].repo
CLIP = manifest.ASSETS["vision"].huggingface.repo


class FakeHub:
    """`files[repo][name]` is what it holds; `requests` are (path, Range header or None)."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.requests: list[tuple[str, str | None]] = []
        self.cuts: dict[str, list[int]] = defaultdict(list)  # bytes after which answers break off
        self.corrupt: set[str] = set()  # names whose bytes arrive changed
        self.vanished: set[str] = set()  # names that are listed but answer 404
        self.busy: dict[str, int] = {}  # names that answer 503, so many times
        self.stalls: dict[str, int] = {}  # bytes after which an answer waits for `release`
        self.release = threading.Event()
        self.without_range = False
        self.uploads = Uploads()
        self.first_commit = COMMIT
        self.packs = False  # answers come gzip-encoded though they were asked for as they are
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # A short poll, so that closing does not wait for half a second.
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def environment(self, home: Path) -> dict[str, str]:
        """For a process of its own: this server as every hub, and another home."""
        mirrors = {variable: self.url for variable, _ in network.ENDPOINTS.values()}
        return mirrors | {"HOME": str(home), "HF_HOME": str(home / "hf"), "NO_PROXY": "127.0.0.1"}

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def ranges(self, name: str) -> list[str | None]:
        """The Range headers of the requests for a file's bytes, in order."""
        return [r for path, r in self.requests if path.startswith("/bytes/") and name in path]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may leave when it likes
            super().handle_error(request, client_address)


class _Handler(UploadRequests, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FakeHub

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(url.query).items()}
        words = unquote(url.path).strip("/").split("/")
        self.owner.requests.append((unquote(self.path), self.headers.get("Range")))
        match words:
            case ["api", "models" | "datasets", owner, name, "revision", revision]:
                self.huggingface_listing(f"{owner}/{name}", revision)
            case ["api", "models", owner, name]:
                assert self.query == {"blobs": "true"}
                self.huggingface_listing(f"{owner}/{name}", "main")
            case ["api", "v1", "models", owner, name, "repo", "files"]:
                self.modelscope_listing(f"{owner}/{name}")
            case ["api", "v1", "datasets", owner, name, "repo", "tree"]:
                self.modelscope_listing(f"{owner}/{name}")
            case ["api", "v1", "models" | "datasets", owner, name, "repo"]:
                self.redirect(f"{owner}/{name}", self.query["FilePath"])
            case [owner, name, "releases", "download", _, file] | [owner, name, "raw", _, *_, file]:
                self.redirect(f"{owner}/{name}", file)
            case ["VLMEval", file] | ["benchmarks", _, file]:
                self.redirect("open/compass", file)
            case [owner, name, "archive", file]:
                self.archive(f"{owner}/{name}", file)
            case ["bytes", owner, name, file]:
                self.send_bytes(f"{owner}/{name}", file)
            case ["datasets", owner, name, "resolve", _, file] | [owner, name, "resolve", _, file]:
                self.redirect(f"{owner}/{name}", file)
            case _:
                self.send_text(404, "no such address")

    def huggingface_listing(self, repo: str, revision: str) -> None:
        if repo not in self.owner.files:
            self.send_json(404, {"error": "Repository not found"}, code="RepoNotFound")
            return
        siblings = []
        for name, data in self.owner.files[repo].items():
            blob = b"blob %d\0" % len(data) + data
            entry = {"rfilename": name, "size": len(data), "blobId": _hex("sha1", blob)}
            if self.is_large(name):
                entry["blobId"] = "f" * 40  # the pointer's, not the content's
                entry["lfs"] = {
                    "sha256": _hex("sha256", data),
                    "size": len(data),
                    "pointerSize": 134,
                }
            siblings.append(entry)
        commit = revision if len(revision) == 40 else self.owner.uploads.head(repo, COMMIT)
        self.send_text(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}))

    def is_large(self, name: str) -> bool:
        return name.endswith(LARGE)

    def modelscope_listing(self, repo: str) -> None:
        if repo not in self.owner.files:
            self.send_text(404, json.dumps({"Code": 10010205001, "Success": False}))
            return
        files = [{"Path": "assets", "Name": "assets", "Type": "tree", "Size": 0}]
        for name, data in self.owner.files[repo].items():
            sha256 = _hex("sha256", data)
            files.append(
                {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": sha256}
            )
        self.send_text(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}))

    def redirect(self, repo: str, name: str) -> None:
        data = self.owner.files[repo].get(name)
        if data is None or name in self.owner.vanished:
            self.send_text(404, "Entry not found")
            return
        self.send_response(302)
        self.send_header("Location", f"{self.owner.url}/bytes/{repo}/{name}")
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Linked-ETag", f'"{_hex("sha256", data)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_bytes(self, repo: str, name: str) -> None:
        if self.owner.busy.get(name, 0) > 0:
            self.owner.busy[name] -= 1
            self.send_text(503, "busy")
            return
        whole = self.owner.files[repo][name]
        if self.owner.packs:
            packed = gzip.compress(whole)
            self.send_response(200)
            self.send_header("Content-Length", str(len(packed)))
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(packed)
            return
        sent = bytes([whole[0] ^ 1]) + whole[1:] if name in self.owner.corrupt else whole
        wanted = None if self.owner.without_range else self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(whole) - start))
        self.send_header("ETag", f'"{_hex("sha256", whole)}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        cuts = self.owner.cuts[name]
        if name in self.owner.stalls:
            self.wfile.write(sent[start : start + self.owner.stalls.pop(name)])
            self.owner.release.wait(60)
            self.close_connection = True
        elif cuts:
            self.wfile.write(sent[start : start + cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(sent[start:])

    def archive(self, repo: str, file: str) -> None:
        """As GitHub: chunked, without a length, a checksum or ranges."""
        data = self.owner.files[repo].get(file)
        if data is None:
            self.send_text(404, "Not Found")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        cuts = self.owner.cuts[file]
        end = cuts.pop(0) if cuts else len(data)
        self.wfile.write(b"%x\r\n%s\r\n" % (end, data[:end]))
        if end == len(data):
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def send_text(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _hex(kind: str, data: bytes) -> str:
    return hashlib.new(kind, data).hexdigest()


@pytest.fixture
def only_this_machine(monkeypatch):
    """Nothing in these tests may reach a real host."""
    connect = socket.socket.connect

    def local_connect(self, address):
        assert address[0] == "127.0.0.1", f"a test tried to reach {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    close_session()  # its client read the environment when it was made
    yield
    close_session()


@pytest.fixture
def hub(only_this_machine, monkeypatch):
    """A hub with small stand-ins of the real files, pinned as those are; no other is asked."""
    fake = FakeHub()
    for variable, _ in network.ENDPOINTS.values():
        monkeypatch.setenv(variable, fake.url)
    clip = {"config.json": CONFIG, "preprocessor_config.json": b"{}\n", "README.md": b"#"}
    clip["pytorch_model.bin"] = random.Random(1).randbytes(5000)
    parquet = {"pretrain_i2t.parquet": PARQUET, "sft_i2t.parquet": PARQUET[:1000]}
    for name in (CLIP, manifest.ASSETS["vision"].modelscope.repo):
        fake.files[name] = dict(clip)
    for name in (DATA, manifest.DATA[1].repo):
        fake.files[name] = dict(parquet)
    for name, data in parquet.items():
        pin(monkeypatch, manifest.DATA[0].sha256, name, data)
    monkeypatch.setattr(network, "RETRY_WAIT_S", 0.0)
    yield fake
    fake.close()


def pin(monkeypatch, pins: dict, name: str, data: bytes) -> None:
    monkeypatch.setitem(pins, name, hashlib.sha256(data).hexdigest())


def run(root: Path, *words: str) -> int:
    return download.main([*words, "--to", str(root), "--yes"])


def error_of(capfd, root: Path, *words: str) -> str:
    """The one line of a run that fails."""
    capfd.readouterr()
    assert run(root, *words) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def files_below(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
