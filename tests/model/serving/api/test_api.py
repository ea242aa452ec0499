"""If this fails, the official OpenAI client cannot talk to `web_demo.py --api`, gets a wrong
answer, or a mistake in a request is not reported.
"""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from support.api_site import (
    MODEL,
    TIMEOUT_S,
    model_flags,
    parts,
    post,
    question,
    served_process,
    served_thread,
)
from support.scripts import run_script
from support.tiny_vlm import make_loaded, picture, round_weights, save_tiny

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.machine.terminal import CONTROLS, shown
from model.serving.api.protocol.stop_text import StopText

SETTINGS = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_completion_tokens": 16}
SAMPLING = Sampling(16, 0.9, 0.9, seed=5)


@pytest.fixture(scope="module")
def engine(assets, tmp_path_factory) -> VLMEngine:
    """Hardly ever ends by itself; its weights are what a file holds."""
    loaded = make_loaded(assets)
    round_weights(loaded)
    loaded.model.model.embed_tokens.weight[2] = 0
    loaded.path = tmp_path_factory.mktemp("api") / f"{MODEL}.pth"
    save_tiny(loaded, loaded.path)
    return VLMEngine(loaded)


@pytest.fixture(scope="module")
def address(assets, engine):
    with served_process(*model_flags(assets, engine.path.parent)) as address:
        yield address


def make_client(address: str, **settings) -> openai.OpenAI:
    settings = {"api_key": "none", "max_retries": 0, "timeout": TIMEOUT_S} | settings
    return openai.OpenAI(base_url=address, **settings)


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return make_client(address)


@pytest.mark.slow
def test_plain_request(client, engine):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "minimind-v"
    messages = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "图像里有什么？"},
    ]
    reply = client.chat.completions.create(model=MODEL, messages=messages, **SETTINGS)
    (answer,) = engine.generate([(messages, [])], SAMPLING)
    (choice,) = reply.choices
    assert choice.message.content == answer.text and choice.message.role == "assistant"
    assert choice.finish_reason == answer.finish_reason == "length"
    assert reply.usage.prompt_tokens == answer.num_prompt_tokens
    assert reply.usage.completion_tokens == answer.num_new_tokens
    assert reply.usage.total_tokens == answer.num_prompt_tokens + answer.num_new_tokens


@pytest.mark.slow
def test_two_images_and_a_second_turn(client, engine):
    few, many = picture(6), picture(9)
    messages = [{"role": "user", "content": parts(few, many, "What?")}]
    reply = client.chat.completions.create(model=MODEL, messages=messages, **SETTINGS)
    ours = ask("What?", num_images=2)
    first = engine.generate([(ours, [few, many])], SAMPLING)[0].text
    assert reply.choices[0].message.content == first
    messages.append({"role": "assistant", "content": first})
    messages.append({"role": "user", "content": parts("Here <image> it is red?", few)})
    reply = client.chat.completions.create(model=MODEL, messages=messages, **SETTINGS)
    ours = engine.remember(ours, first) + ask("Here <image> it is red?", num_images=1)
    second = engine.generate([(ours, [few, many, few])], SAMPLING)[0].text
    assert reply.choices[0].message.content == second


@pytest.mark.slow
@pytest.mark.parametrize("with_usage", [False, True])
def test_streamed_request(client, engine, with_usage):
    body = question(picture(6), "What is in the picture?", **SETTINGS)
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = list(client.chat.completions.create(**body, **options, stream=True))
    ours = ask("What is in the picture?", num_images=1)
    (answer,) = engine.generate([(ours, [picture(6)])], SAMPLING)
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == answer.text and sum(map(bool, deltas)) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    if with_usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == answer.num_new_tokens
    else:
        assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.slow
def test_stop_strings_cut_the_answer(client, engine):
    full = engine.generate([(ask("What?", num_images=0), [])], SAMPLING)[0].text
    stop = full[6:9]
    body = question("What?", **SETTINGS, stop=["no such text", stop])
    reply = client.chat.completions.create(**body)
    assert reply.choices[0].message.content == full[: full.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(**body, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == full[: full.index(stop)]


def test_stop_string_of_the_last_token_allowed_is_the_reason(engine):
    messages = ask("What?", num_images=0)
    texts = [
        engine.generate([(messages, [])], replace(SAMPLING, max_new_tokens=n))[0].text
        for n in range(17)[1:]
    ]
    # The last token is the one that makes the text hold the stop string.
    limit = next(n for n in range(2, 17) if texts[n - 1][-1:] not in texts[n - 2])
    text, stop = texts[limit - 1], texts[limit - 1][-1]
    with served_thread(engine) as address:
        client = make_client(address)
        body = question("What?", **SETTINGS | {"max_completion_tokens": limit}, stop=stop)
        (choice,) = client.chat.completions.create(**body).choices
        assert choice.finish_reason == "stop" and choice.message.content + stop == text
        chunks = list(client.chat.completions.create(**body, stream=True))
        assert chunks[-1].choices[0].finish_reason == "stop"
        body["stop"] = "no such text"
        assert client.chat.completions.create(**body).choices[0].finish_reason == "length"


def test_known_arguments_may_be_null_or_ask_for_nothing(engine):
    names = set(CompletionCreateParamsBase.__annotations__) - {"model", "messages"}
    empty = {"function_call": "none", "reasoning_effort": "none", "tool_choice": "none"}
    with served_thread(engine) as address:
        for fields in (dict.fromkeys([*names, "stream"]), empty, {"reasoning_effort": "low"}):
            body = question("What?") | fields | {"max_tokens": 2}
            assert post(address, json.dumps(body).encode())[0] == 200, fields
        for name, value in (
            ("function_call", {"name": "f"}),
            ("audio", {"voice": "a"}),
            ("web_search_options", {}),
        ):
            status, reply = post(address, json.dumps(question("What?") | {name: value}).encode())
            assert status == 400 and reply["error"]["param"] == name


def test_stop_text_is_found_across_pieces():
    for text, stops in {
        "one two three": ["two"],
        "aaab": ["aab"],
        "中文完": ["文完"],
        "no stop": ["stopped"],
        "xyxyz": ["xyz", "yx"],
        "end": ["d"],
        "abc": [],
    }.items():
        expected = text[: min([text.find(s) for s in stops if s in text], default=len(text))]
        for size in range(1, len(text) + 1):
            stop, said = StopText(stops), ""
            for start in range(0, len(text), size):
                said += stop.push(text[start : start + size])
                if stop.is_found:
                    break
            assert said + ("" if stop.is_found else stop.rest()) == expected, (text, stops, size)


@pytest.mark.slow
def test_one_seed_gives_one_text_everywhere(assets, engine, client, tmp_path):
    """Engine, API, chat (fed by a pipe, without a locale) and the description of a folder."""
    picture(6).save(tmp_path / "a.png")
    prompt, sampling = "图像里有什么？", Sampling(16, 0.9, 0.9, seed=7)
    text = engine.generate([(ask(prompt, num_images=1), [picture(6)])], sampling)[0].text
    reply = client.chat.completions.create(**question(picture(6), prompt, **SETTINGS | {"seed": 7}))
    assert reply.choices[0].message.content == text
    flags = [
        *model_flags(assets, engine.path.parent),
        *"--seed 7 --temperature 0.9 --top_p 0.9 --max_new_tokens 16".split(),
    ]
    described = run_script("eval_vlm.py", *flags, "--image_dir", tmp_path, "--prompt", prompt)
    assert shown(text.strip()) in described.stdout
    asked = f"/image {tmp_path}/a.png\n{prompt}\n"
    piped = {"stdin": asked, "env": {"LC_ALL": "C"}, "cold": True}
    talked = run_script("eval_vlm.py", *flags, "--chat", **piped)
    assert text.translate(CONTROLS).strip() in talked.stdout and talked.stderr == ""


@pytest.mark.slow
def test_64_requests_at_once_are_all_answered(address, engine):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=address, api_key="none", max_retries=0, timeout=TIMEOUT_S
        ) as client:
            bodies = [question(picture(6), "What?", **SETTINGS | {"seed": i}) for i in range(64)]
            replies = await asyncio.gather(
                *[client.chat.completions.create(**body) for body in bodies]
            )
        return [reply.choices[0].message.content for reply in replies]

    sample = (ask("What?", num_images=1), [picture(6)])
    expected = [
        engine.generate([sample], Sampling(16, 0.9, 0.9, seed=i))[0].text for i in range(64)
    ]
    assert asyncio.run(ask_all()) == expected and len(set(expected)) > 32


LONG = {"max_tokens": 30_000, "temperature": 0}


def test_queue_is_limited_and_a_client_that_leaves_frees_its_place(engine):
    """One place and one seat to wait: a third is refused; then each leaves in turn."""
    with served_thread(engine, concurrency=1, queue=1) as address:
        client = make_client(address)
        running = client.chat.completions.create(**question("What?", **LONG), stream=True)
        assert [next(running) for _ in range(3)][2].choices[0].delta.content
        with ThreadPoolExecutor(1) as pool:
            patient = make_client(address, max_retries=100)  # until it has the seat
            waiting = pool.submit(patient.chat.completions.create, **question("A?", max_tokens=2))
            hasty = make_client(address, timeout=1)
            deadline = time.monotonic() + TIMEOUT_S
            while True:  # until the one above waits, the next one would
                assert time.monotonic() < deadline
                try:
                    hasty.chat.completions.create(**question("B?", **LONG))
                except openai.RateLimitError as error:
                    assert error.body["code"] == "queue_full"
                    assert error.response.headers["retry-after"] == "1"
                    break
                except openai.APITimeoutError:
                    time.sleep(2)  # it took the seat first, and has left it now
            assert not waiting.done()
            running.close()
            assert waiting.result(timeout=TIMEOUT_S).usage.completion_tokens == 2
        plain = make_client(address, timeout=2)
        with pytest.raises(openai.APITimeoutError):  # leaves without having been answered
            plain.chat.completions.create(**question("What?", **LONG))
        reply = client.chat.completions.create(**question("What?", max_tokens=2))
        assert reply.usage.completion_tokens == 2


def test_failure_is_told_and_frees_the_place(engine, monkeypatch):
    step, calls = engine.model.lm_head.forward, []

    def fail_at_the_third_token(hidden):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise RuntimeError("broken on purpose")
        return step(hidden)

    monkeypatch.setattr(engine.model.lm_head, "forward", fail_at_the_third_token)
    with served_thread(engine, concurrency=1, queue=0) as address:
        client, body = make_client(address), question("What?", **SETTINGS)
        for _ in range(2):
            with pytest.raises(
                openai.InternalServerError, match="failed on this request"
            ) as caught:
                client.chat.completions.create(**body)
            assert "broken on purpose" not in str(caught.value)
            said = []
            with pytest.raises(openai.APIError, match="failed on this"):
                for chunk in client.chat.completions.create(**body, stream=True):
                    said.append(chunk)
            assert said
        monkeypatch.undo()
        assert client.chat.completions.create(**body).usage.completion_tokens == 16


def test_key_is_asked_for_if_there_is_one(engine):
    with served_thread(engine, api_key="secret") as address:
        for wrong in ("none", "secret2", "Secret"):
            with pytest.raises(openai.AuthenticationError, match="incorrect API key"):
                make_client(address, api_key=wrong).models.list()
        assert make_client(address, api_key="secret").models.list().data[0].id == MODEL
        assert post(address, b"{}")[0] == 401


@pytest.mark.slow
def test_server_names_what_keeps_it_from_starting(assets, engine):
    with served_thread(engine) as address:
        port = address.rpartition(":")[2].removesuffix("/v1")
        flags = [*model_flags(assets, engine.path.parent), "--port", port]
        process = run_script("web_demo.py", "--api", *flags, check=False, timeout_s=TIMEOUT_S)
    assert process.returncode == 1
    assert process.stderr == (
        f"error: cannot listen at 127.0.0.1:{port}: Address already in use; try another --port\n"
    )
