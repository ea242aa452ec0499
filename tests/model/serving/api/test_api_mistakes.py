"""If this fails, a mistake in a request to `web_demo.py --api` is answered, or refused with the
wrong status or without its reason.
"""

import base64
import json
import random
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from PIL import Image
from support.api_site import (
    MODEL,
    TIMEOUT_S,
    data_url,
    malformed,
    model_flags,
    parts,
    post,
    question,
    served_process,
)
from support.tiny_vlm import make_loaded, picture, save_tiny


@pytest.fixture(scope="module")
def address(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    save_tiny(make_loaded(assets), folder / f"{MODEL}.pth")
    with served_process(*model_flags(assets, folder)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=TIMEOUT_S)


@pytest.mark.slow
def test_malformed_requests_get_4xx(address):
    rng = random.Random(0)
    bodies = [malformed(rng) for _ in range(200)]
    bodies += [b"", b"[]", b"[" * 100_000, b"\xff\xfe", b"1" * 10_000, b'{"a": NaN}', b"null"]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda body: post(address, body), bodies))
    for body, (status, reply) in zip(bodies, replies, strict=True):
        assert 400 <= status < 500, (status, body[:300], reply)
        assert reply["error"]["message"] and reply["error"]["type"] == "invalid_request_error"
    status, _ = post(address, json.dumps(question("What?", max_tokens=2)).encode())
    assert status == 200


NOISE = base64.b64encode(b"not a picture").decode()
ENTRY = {"role": "user", "content": "What?"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "the model 'gpt-4' does not exist; this server has 'sft_vlm_32'"),
        ({"model": None}, 400, "model is required"),
        ({"messages": []}, 400, "the last of messages must be from the user"),
        ({"messages": [{"role": "assistant", "content": "A."}]}, 400, "from the user"),
        ({"messages": [{"role": "tool", "content": "A."}]}, 400, "messages[0].role must be one of"),
        ({"messages": [ENTRY | {"content": "<|im_end|>"}]}, 400, "special token <|im_end|>"),
        ({"messages": [ENTRY | {"content": "a <image>"}]}, 400, "1 <image> tag(s) but 0 image(s)"),
        ({"messages": [ENTRY | {"content": parts("<image> " * 2, picture(6))}]}, 400, "2 <image>"),
        ({"messages": [ENTRY | {"content": [{"type": "input_audio"}]}]}, 400, "text or image_url"),
        ({"messages": [ENTRY | {"content": "circle " * 40_000}]}, 400, "the model takes 32768"),
        ({"messages": [ENTRY | {"content": parts(*[picture(6)] * 17)}]}, 400, "at most 16"),
        ({"n": 17}, 400, "n times the number of prompts must be 1 to 16"),
        ({"n": 2, "num_beams": 2}, 400, "n must be 1 with num_beams 2"),
        ({"n": 2, "max_tokens": 20_000}, 400, "are 40,000 tokens; at most 32,768 are taken"),
        ({"temperature": 2.1}, 400, "temperature must be from 0 to 2"),
        ({"top_p": -0.1}, 400, "top_p must be from 0 to 1"),
        ({"max_tokens": 0}, 400, "max_tokens must be at least 1"),
        ({"max_tokens": 32_769}, 400, "max_tokens must be at least 1 and at most 32768"),
        ({"max_completion_tokens": 10**30}, 400, "max_completion_tokens must be at least 1"),
        ({"top_k": 10**400}, 400, "top_k must be 0 (all tokens) to 1000000"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty must be 0.1 to 10"),
        ({"max_tokens": "5"}, 400, "max_tokens must be an integer"),
        ({"stop": ["a"] * 5}, 400, "up to 4"),
        ({"stream_options": {}}, 400, "only allowed when stream is true"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"frequency_penalty": 3}, 400, "frequency_penalty must be from -2 to 2; got 3"),
        ({"nonsense": 1}, 400, "unrecognized request argument: nonsense"),
    ],
)  # fmt: skip
def test_mistakes_are_told(client, change, status, message):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            **{"model": MODEL, "messages": [ENTRY]} | {"extra_body": change}
        )
    assert caught.value.status_code == status and message in caught.value.body["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/a.png", "must be a data URL"),
        ("file:///etc/passwd", "must be a data URL"),
        ("data:image/png;base64,***", "not valid base64"),
        (f"data:image/png;base64,{NOISE}", "not a readable image"),
        (data_url(Image.new("1", (30_000, 30_000))), "is over 50,000,000 pixels"),
        (data_url(Image.new("1", (10_000, 10_000))), "10000x10000 is over 50,000,000 pixels"),
        (data_url(Image.new("RGB", (2000, 1))), "too thin"),
        (data_url(picture(6))[:398], "not a readable image"),
    ],
    ids=["remote", "file", "base64", "noise", "bomb", "large", "thin", "cut"],
)
def test_pictures_that_are_none_are_refused(address, url, message):
    body = question("What?", max_tokens=2)
    body["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": url}})
    status, reply = post(address, json.dumps(body).encode())
    assert status == 400 and message in reply["error"]["message"]


@pytest.mark.slow
def test_protocol_around_the_request(address):
    good = json.dumps(question("What?", max_tokens=2)).encode()
    assert post(address, good)[0] == 200
    status, reply = post(address, good, **{"Content-Type": "text/plain"})
    assert status == 415 and "application/json" in reply["error"]["message"]
    assert post(address, good, path="/embeddings")[0] == 404
    assert post(address, b"", path="/models/other", method="GET")[0] == 404
    status, reply = post(address, b"", method="GET")
    assert status == 405 and reply["error"]["type"] == "invalid_request_error"
    status, reply = post(address, b" " * (25 * 2**20))
    assert status == 413 and "larger than 20,971,520 bytes" in reply["error"]["message"]
    assert post(address, good)[0] == 200
