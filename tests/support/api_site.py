"""Offers servers for the tests of `web_demo.py --api`: a real process, or one in a thread whose
engine a test can break; and what the official client sends.
"""

import base64
import contextlib
import http.client
import io
import json
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from PIL import Image
from support.scripts import start_cold
from support.tiny_vlm import make_loaded, never_end
from support.warm import Program

from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling
from model.serving.api.connection import Patience, server_config
from model.serving.api.server import create_app

MODEL = "sft_vlm_32"
TIMEOUT_S = 300  # a busy machine is slow


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def parts(*content: str | Image.Image) -> list[dict]:
    """Content of a question: texts and pictures."""
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in content
    ]


def question(*content: str | Image.Image, **fields) -> dict:
    """A request of one question."""
    return {"model": MODEL, "messages": [{"role": "user", "content": parts(*content)}]} | fields


@contextlib.contextmanager
def started_process(*flags, env: dict | None = None) -> Iterator[tuple[str, int]]:
    """`web_demo.py --api` on a free port; yields its address and process id. With `env` Python
    itself is started with these variables."""
    words = ["web_demo.py", "--api", "--port", "0", *flags]
    if env is None:
        process = Program(*words, stdout=subprocess.PIPE)
    else:
        silent = {"stdout": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
        process = start_cold(*words, env=env, **silent)
    try:
        line = process.stdout.readline()
        address = re.search(r"http://\S+/v1", line)
        assert address, f"no address: {line!r}"
        yield address[0], process.pid
        process.terminate()
        assert process.wait(timeout=TIMEOUT_S) in (0, -15)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def served_process(*flags) -> Iterator[str]:
    """The address alone of `started_process`."""
    with started_process(*flags) as (address, _):
        yield address


@contextlib.contextmanager
def served_thread(
    engine: VLMEngine,
    *,
    defaults: Sampling | None = None,
    patience: Patience | None = None,
    max_connections: int = 100,
    **limits,
) -> Iterator[str]:
    """The application in a thread of this process; yields its address."""
    app = create_app(engine, defaults or Sampling(), **limits)
    config = server_config(app, max_connections=max_connections, patience=patience, port=0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + TIMEOUT_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(timeout=TIMEOUT_S)


def model_flags(assets: Path, folder: Path) -> list:
    return [
        "--save_dir",
        folder,
        "--device",
        "cpu",
        "--vision_model_path",
        assets / "tower",
        "--tokenizer_path",
        assets / "tokenizer",
    ]


def post(
    address: str,
    body: bytes,
    *,
    path: str = "/chat/completions",
    method: str = "POST",
    **headers: str,
) -> tuple[int, dict]:
    """Status and JSON of a raw request."""
    host, _, prefix = address.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=TIMEOUT_S)
    headers = {"Content-Type": "application/json"} | headers
    try:
        connection.request(method, f"/{prefix}{path}", body=body, headers=headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


VALUES = (None, True, -1, 0, 3, 1e400, 10**400, -0.5, "", "x", "\ud800", "<|im_end|>", [], [[]],
          {}, {"type": "text"}, [None], [{"role": "user"}], [{"role": {}, "content": "a"}],
          [{"role": "tool", "content": "a"}], [{"role": "assistant", "content": "a"}])  # fmt: skip
IMAGES = ("", "x", "data:", "data:image/png;base64,", "data:image/png;base64,####",
          "data:image/png;base64,AAAA", "data:text/plain;base64,AAAA", "file:///etc/passwd",
          "http://127.0.0.1:1/a.png", "https://example.com/a.png", 5, None, {})  # fmt: skip


def malformed(rng: random.Random) -> bytes:
    """A body that no server should take: one wrong field, a wrong picture, or broken JSON."""
    body = question("What?", max_tokens=2)
    kind = rng.randrange(4)
    if kind == 0:
        content = [{"type": "image_url", "image_url": {"url": rng.choice(IMAGES)}}]
        body["messages"] = [{"role": "user", "content": content}]
    elif kind == 1:
        data = bytearray(json.dumps(body).encode())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data[rng.randrange(len(data) // 2)] = 0  # a zero byte is nowhere JSON
        return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
    elif kind == 2:
        wrong = rng.choice(
            [
                "n",
                "seed",
                "stop",
                "stream",
                "max_tokens",
                "temperature",
                "top_p",
                "tools",
                "stream_options",
                "nonsense",
                "top_k",
                "num_beams",
            ]
        )
        body[wrong] = rng.choice([[1], {"a": 1}, [""], 10**400, "", {"include_usage": 3}])
    else:
        field = rng.choice(["model", "messages", "content", "part"])
        value = rng.choice(VALUES)
        if field in body:
            body[field] = value
        elif field == "content":
            body["messages"][0]["content"] = value if not isinstance(value, str) else "<image>"
        else:
            body["messages"][0]["content"] = [value]
    return json.dumps(body).encode()


def endless_engine(assets) -> VLMEngine:
    """The tiny model, under the name `MODEL`, whose answers are as long as they may be."""
    loaded = make_loaded(assets)
    never_end(loaded.model)
    loaded.path = assets / f"{MODEL}.pth"
    loaded.path.touch()
    return VLMEngine(loaded)
