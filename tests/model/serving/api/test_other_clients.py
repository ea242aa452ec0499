"""If this fails, the clients that people use beside the official one are refused, or told something
else, by `web_demo.py --api`, with their defaults: LangChain's, LiteLLM's and Open WebUI's.

They are no part of the requirements; the tests run where they are installed:

    pip install "langchain-openai>=1.7,<2" "litellm>=1.110,<2"

Open WebUI has an environment of its own, for it fixes the versions of what both need:

    python3 -m venv webui && webui/bin/pip install "open-webui>=0.12,<0.13"
    OPEN_WEBUI=webui/bin/open-webui pytest tests/model/serving/api/test_other_clients.py
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.api_site import MODEL, data_url, endless_engine, parts, served_thread
from support.scripts import free_port
from support.tiny_vlm import picture

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling

pytestmark = [pytest.mark.full, pytest.mark.slow]
HOW = 'not installed: pip install "langchain-openai>=1.7,<2" "litellm>=1.110,<2"'
START_S = 180  # Open WebUI makes its database first
PLAIN = Sampling(24, temperature=0)  # the server's, which clients do not name


@pytest.fixture(scope="module")
def engine(assets) -> VLMEngine:
    return endless_engine(assets)


@pytest.fixture(scope="module")
def address(engine):
    with served_thread(engine, defaults=PLAIN) as address:
        yield address


def text_of(engine: VLMEngine, messages: list, images: list) -> str:
    return engine.generate([(messages, images)], PLAIN)[0].text


def conversation(engine: VLMEngine) -> list[tuple[list[dict], list, list[dict]]]:
    """Plain, with two pictures, and a second turn: ours, pictures, theirs."""
    few, many = picture(6), picture(9)
    plain = ask("图像里有什么？", num_images=0)
    two, shown = ask("What?", num_images=2), [few, many]
    begun = [{"role": "user", "content": parts(few, many, "What?")}]
    first = text_of(engine, two, shown)
    history = [*begun, {"role": "assistant", "content": first}]
    return [
        (plain, [], plain),
        (two, shown, begun),
        (
            engine.remember(two, first) + ask("And now?", num_images=0),
            shown,
            [*history, {"role": "user", "content": "And now?"}],
        ),
    ]


def test_langchain(engine, address):
    library = pytest.importorskip("langchain_openai", reason=HOW)
    chat = library.ChatOpenAI(base_url=address, api_key="none", model="default", max_retries=0)
    for ours, images, theirs in conversation(engine):
        expected = text_of(engine, ours, images)
        reply = chat.invoke(theirs)
        assert reply.content == expected
        assert reply.usage_metadata["output_tokens"] == 24
        chunks = list(chat.stream(theirs))
        assert "".join(chunk.content for chunk in chunks) == expected and len(chunks) > 3
    several = library.ChatOpenAI(
        base_url=address, api_key="none", model=MODEL, logprobs=True, top_logprobs=2, n=2
    )
    messages = pytest.importorskip("langchain_core.messages", reason=HOW)
    told = several.generate([[messages.HumanMessage("What?")]])
    assert len(told.generations[0]) == 2
    text = library.OpenAI(
        base_url=address, api_key="none", model=MODEL, max_retries=0, temperature=0, max_tokens=24
    )
    prompt = engine.processor.render(ask("What?", num_images=0), add_generation_prompt=True)
    expected = text_of(engine, ask("What?", num_images=0), [])
    assert text.invoke(prompt) == expected == "".join(text.stream(prompt))


def test_litellm(engine, address):
    litellm = pytest.importorskip("litellm", reason=HOW)
    asked = {"model": f"openai/{MODEL}", "api_base": address, "api_key": "none", "max_retries": 0}
    for ours, images, theirs in conversation(engine):
        expected = text_of(engine, ours, images)
        reply = litellm.completion(messages=theirs, **asked)
        assert reply.choices[0].message.content == expected
        assert reply.usage.completion_tokens == 24
        chunks = list(litellm.completion(messages=theirs, stream=True, **asked))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == expected
    settings = {"n": 2, "logprobs": True, "top_logprobs": 1, "presence_penalty": 0.5, "stop": ["x"]}
    reply = litellm.completion(messages=[{"role": "user", "content": "What?"}], **asked, **settings)
    assert len(reply.choices) == 2
    as_text = {"type": "image_url", "image_url": data_url(picture(6))}  # a string, as some send it
    reply = litellm.completion(messages=[{"role": "user", "content": [as_text]}], **asked)
    assert reply.choices[0].message.content
    text = litellm.text_completion(
        prompt="a circle", **asked | {"model": f"text-completion-openai/{MODEL}"}
    )
    assert text.choices[0].text


@contextlib.contextmanager
def open_webui(address: str, folder: Path):
    """Open WebUI with this server as its only one, and no other setting about it; gives a function
    that asks it: path and JSON -> text."""
    command = os.environ.get("OPEN_WEBUI") or shutil.which("open-webui")
    if command is None:
        pytest.skip('not installed: pip install "open-webui>=0.12,<0.13", in its own environment')
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "OPENAI_API_BASE_URL": address,
        "OPENAI_API_KEY": "none",
        "ENABLE_OLLAMA_API": "False",
        "WEBUI_AUTH": "False",  # whoever asks is its administrator
        "OFFLINE_MODE": "True",
        "DATA_DIR": str(folder),
    }
    token = ""

    def asked(path: str, body: dict | None = None) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", f"Bearer {token}")
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(request, data, timeout=START_S) as reply:
            return reply.read().decode()

    words = [os.path.abspath(command), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline_s = time.monotonic() + START_S
        while not token:
            said = (folder / "log.txt").read_text()[-2000:]
            assert process.poll() is None and time.monotonic() < deadline_s, said
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                who = {"email": "", "password": ""}
                token = json.loads(asked("/api/v1/auths/signin", who))["token"]
            time.sleep(0.5)
        yield asked
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_open_webui(engine, address, tmp_path):
    with open_webui(address, tmp_path) as asked:
        assert [model["id"] for model in json.loads(asked("/api/models"))["data"]] == [MODEL]
        for ours, images, theirs in conversation(engine):
            expected = text_of(engine, ours, images)
            body = {"model": MODEL, "messages": theirs, "stream": False}
            reply = json.loads(asked("/api/chat/completions", body))
            assert reply["choices"][0]["message"]["content"] == expected
            assert reply["usage"]["completion_tokens"] == 24
            lines = asked("/api/chat/completions", body | {"stream": True}).splitlines()
            events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
            deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
            assert "".join(delta.get("content") or "" for delta in deltas) == expected
