"""Offers a visitor of the page without a browser: what Gradio's page sends over plain HTTP, and
what it never would send. Each request has a connection of its own.
"""

import contextlib
import http.client
import io
import json
import secrets
import socket
import time
import urllib.parse
from dataclasses import dataclass, field

from PIL import Image
from support.web_visitor import PASSWORD, Site

TIMEOUT_S = 60
GONE = 0  # instead of a status: the server closed the connection without a word
BOUNDARY = "a-boundary"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
SETTINGS = {"seed": "7", "temperature": 0.6, "top_p": 0.8, "top_k": 0, "penalty": 1}


@dataclass
class Reply:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self):
        assert self.status == 200, self
        return json.loads(self.body)


def picture(colour: str = "red", *, side: int = 24, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, kind)
    return file.getvalue()


def form(*files: tuple[str, bytes]) -> bytes:
    """A multipart body of `files`."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{{}}"\r\n\r\n'
    parts = [head.format(name).encode() + content + b"\r\n" for name, content in files]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


class HttpVisitor:
    """Someone at the page of a site, in a session of their own.

    Args:
        like: whose login is used, by somebody else.
        length: tokens of each answer.
    """

    def __init__(
        self,
        site: Site,
        *,
        password: str | None = PASSWORD,
        like: "HttpVisitor | None" = None,
        length: int = 1,
    ):
        self.host = urllib.parse.urlsplit(site.url).netloc
        self.cookies: dict[str, str] = {}
        self.session, self.length = secrets.token_hex(6), length
        if like is not None:
            self.functions = like.functions
            self.cookies = {
                name: secrets.token_urlsafe(16) if name.startswith("visitor-") else value
                for name, value in like.cookies.items()
            }
        elif password is not None:
            assert self.log_in(password).status == 200
            self.request("GET", "/")  # for the cookie by which the server knows its visitors
            self.config = self.request("GET", "/config").json()
            dependencies = [d for d in self.config["dependencies"] if d["targets"]]
            self.functions = {d["api_name"]: (d["id"], d["targets"][0][0]) for d in dependencies}

    def connect(self, timeout_s: float = TIMEOUT_S) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, timeout=timeout_s)

    def own_headers(self) -> dict[str, str]:
        cookies = "; ".join(f"{k}={v}" for k, v in self.cookies.items())
        return {"Cookie": cookies} if cookies else {}

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        **headers: str,
    ) -> Reply:
        """The whole reply, or of a stream of events its beginning."""
        headers = {k.replace("_", "-"): v for k, v in headers.items()}
        connection = self.connect(timeout_s)
        try:
            connection.request(method, path, body, self.own_headers() | headers)
            answer = connection.getresponse()
            for name, value in answer.getheaders():
                if name == "set-cookie":
                    key, _, token = value.partition(";")[0].partition("=")
                    self.cookies[key] = token
            is_stream = "event-stream" in answer.headers.get("content-type", "")
            text = answer.read1() if is_stream else answer.read()
            return Reply(answer.status, dict(answer.getheaders()), text)
        except (ConnectionError, http.client.BadStatusLine):
            return Reply(GONE)
        finally:
            connection.close()

    def post(self, path: str, data, **headers: str) -> Reply:
        headers = {"Content_Type": "application/json"} | headers
        return self.request("POST", path, json.dumps(data).encode(), **headers)

    def log_in(self, password: str) -> Reply:
        body = urllib.parse.urlencode({"username": "me", "password": password}).encode()
        kind = "application/x-www-form-urlencoded"
        return self.request("POST", "/login", body, Content_Type=kind)

    def upload(self, *files: tuple[str, bytes]) -> Reply:
        return self.request("POST", "/gradio_api/upload", form(*files), Content_Type=MULTIPART)

    def question(self, text: str, paths=()) -> dict:
        """What the page sends when a question is asked."""
        files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
        box = {"text": text, "files": files}
        data = [box, None, None, "English", None, *SETTINGS.values(), self.length, 1, False]
        return self.touch("_ask", *data)

    def touch(self, name: str, *data) -> dict:
        """What the page sends when a part is touched."""
        index, trigger = self.functions[name]
        return {
            "data": list(data),
            "event_data": None,
            "fn_index": index,
            "trigger_id": trigger,
            "session_hash": self.session,
        }

    def follow(self, event: dict) -> dict:
        """Send an event and read its stream; returns the last message that says something."""
        joined = self.post("/gradio_api/queue/join", event)
        assert joined.status == 200, joined
        connection = self.connect()
        path = f"/gradio_api/queue/data?session_hash={event['session_hash']}"
        with contextlib.closing(connection):
            connection.request("GET", path, headers=self.own_headers())
            answer = connection.getresponse()
            assert answer.status == 200
            messages = [json.loads(line[5:]) for line in answer if line.startswith(b"data:")]
        (done,) = (m for m in messages if m["msg"] == "process_completed")
        done["warnings"] = [m["log"] for m in messages if m["msg"] == "log"]
        return done

    def ask(self, text: str, paths=()) -> str:
        """The answer's status line; empty for one that was refused."""
        done = self.follow(self.question(text, paths))
        assert done["success"], done
        status = done["output"]["data"][3]
        return status if isinstance(status, str) else ""

    @contextlib.contextmanager
    def present(self):
        """The page is open: it holds a heartbeat."""
        with contextlib.closing(self.connect()) as connection:
            path = f"/gradio_api/heartbeat/{self.session}"
            connection.request("GET", path, headers=self.own_headers())
            assert connection.getresponse().status == 200
            yield

    def upload_head(self, num_bytes: int) -> str:
        """Of an upload whose body comes, or does not, on the same `raw` connection."""
        return (
            f"POST /gradio_api/upload HTTP/1.1\nHost: {self.host}\nContent-Type: {MULTIPART}\n"
            f"Cookie: {self.own_headers()['Cookie']}\nContent-Length: {num_bytes}\n\n"
        )

    def raw(self, head: str, body: bytes = b"") -> socket.socket:
        """A connection on which these bytes, and no more, were sent."""
        name, port = self.host.split(":")
        connection = socket.create_connection((name, int(port)), timeout=TIMEOUT_S)
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        return connection


def good_visit(site: Site, like: HttpVisitor | None = None) -> float:
    """Come, show a picture, ask, and go; returns the seconds that the answer took."""
    visitor = HttpVisitor(site, like=like)
    with visitor.present():
        (path,) = visitor.upload(("red.png", picture())).json()
        started_s = time.monotonic()
        assert "tokens" in visitor.ask("What is in the picture?", [path])
        return time.monotonic() - started_s


def slow_visit(
    site: Site, like: HttpVisitor | None = None, *, pause_s: float = 0.2, num_pieces: int = 5
) -> None:
    """Send an upload by and by, ask, and read the answer by and by."""
    visitor = HttpVisitor(site, like=like, length=20)
    body = form(("blue.png", picture("blue")))
    head = visitor.upload_head(len(body))
    with contextlib.closing(visitor.raw(head)) as connection:
        for i in range(num_pieces):
            connection.sendall(
                body[len(body) * i // num_pieces : len(body) * (i + 1) // num_pieces]
            )
            time.sleep(pause_s)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert visitor.post("/gradio_api/queue/join", visitor.question("Slowly?")).status == 200
    with contextlib.closing(visitor.connect()) as reader:
        path = f"/gradio_api/queue/data?session_hash={visitor.session}"
        reader.request("GET", path, headers=visitor.own_headers())
        answer = reader.getresponse()
        while answer.read1(200):
            time.sleep(pause_s / 10)


def aborted_visit(site: Site, like: HttpVisitor | None = None) -> None:
    """Go in the middle of an upload, and in the middle of an answer."""
    visitor = HttpVisitor(site, like=like, length=500)
    head = visitor.upload_head(1_000_000)
    visitor.raw(head, form(("cut.png", picture()))[:-20]).close()
    with visitor.present():
        assert visitor.post("/gradio_api/queue/join", visitor.question("And?")).status == 200
        path = f"/gradio_api/queue/data?session_hash={visitor.session}"
        assert visitor.request("GET", path).status == 200  # its first events only


def bad_visit(site: Site, like: HttpVisitor, rng) -> None:
    """Send what no page sends; the answer is a refusal."""
    from support.web_fuzz import malformed

    visitor = HttpVisitor(site, like=like)
    for _ in range(5):
        attack = malformed(rng, visitor)
        reply = visitor.request(attack.method, attack.path, attack.body, **attack.headers)
        assert reply.status < 500, attack
