"""If this fails, a client of the API gets another answer than beam search finds, none of what it
asked for, or can keep the whole server busy by one request.
"""

import asyncio
import contextlib
import json
import time

import openai
import pytest
from support.api_site import MODEL, post, question, served_thread
from support.api_socket import connect, whole
from support.tiny_vlm import make_loaded, never_end, picture

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.serving.api.places import Places
from model.serving.api.protocol.fields import ApiError
from model.serving.api.protocol.request import Asked, parse_chat

BEAMS = {"num_beams": 4, "length_penalty": 0.5}
SAMPLING = Sampling(16, temperature=0, **BEAMS)
WITHIN_S = 60


@pytest.fixture(scope="module")
def engine(assets) -> VLMEngine:
    loaded = make_loaded(assets)
    loaded.path = assets / f"{MODEL}.pth"
    loaded.path.touch()
    never_end(loaded.model)
    engine = VLMEngine(loaded)
    engine.steps = []
    loaded.model.lm_head.register_forward_hook(lambda *_: engine.steps.append(1))
    return engine


@pytest.fixture(scope="module")
def address(engine):
    with served_thread(engine) as address:
        yield address


def expected(engine: VLMEngine) -> str:
    messages = ask("<image>\nWhat?", num_images=1)
    (answer,) = engine.generate([(messages, [picture(6)])], SAMPLING)
    (other,) = engine.generate([(messages, [picture(6)])], Sampling(16, temperature=0))
    assert answer.text != other.text
    return answer.text


def test_answer_is_the_best_beam_whole_and_streamed(address, engine):
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    body = question(picture(6), "What?", max_tokens=16)
    reply = client.chat.completions.create(**body, extra_body=BEAMS)
    (choice,) = reply.choices
    assert (choice.message.content, choice.finish_reason) == (expected(engine), "length")
    assert reply.usage.completion_tokens == 16
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**body, **options, extra_body=BEAMS))
    said = [c.choices[0].delta.content for c in chunks if c.choices]
    assert [text for text in said if text] == [choice.message.content]
    assert chunks[-1].usage == reply.usage


def test_stop_string_cuts_the_best_beam(address, engine):
    text = expected(engine)
    body = question(picture(6), "What?", max_tokens=16, stop=text[5:8]) | BEAMS
    status, reply = post(address, json.dumps(body).encode())
    (choice,) = reply["choices"]
    assert status == 200 and choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == text[: text.index(text[5:8])]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"num_beams": 0}, "num_beams", "num_beams must be 1 (no beam search) to 16; got 0"),
        ({"num_beams": 17}, "num_beams", "to 16; got 17"),
        ({"num_beams": 10**300}, "num_beams", "num_beams must be 1"),
        ({"num_beams": 2.5}, "num_beams", "num_beams must be an integer"),
        ({"num_beams": True}, "num_beams", "num_beams must be an integer"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams", "it needs temperature 0; got 0.5"),
        ({"length_penalty": 99}, "length_penalty", "length_penalty must be from -10 to 10"),
        ({"use_beam_search": True}, "use_beam_search", "unrecognized request argument"),
    ],
)
def test_mistakes_are_told(engine, fields, param, message):
    with pytest.raises(ApiError) as caught:
        parse(engine, Sampling(), **fields)
    assert caught.value.status == 400 and caught.value.param == param
    assert message in caught.value.message


def parse(engine: VLMEngine, defaults: Sampling, **fields) -> Sampling:
    body = json.dumps(question("What?") | fields).encode()
    return parse_chat(body, Asked(engine, [MODEL], defaults)).sampling


def test_what_a_request_names_counts_before_the_flags(engine):
    flags = Sampling(temperature=0, num_beams=3, length_penalty=0.0)
    assert parse(engine, flags) == flags
    drawn = parse(engine, flags, temperature=0.5)
    assert (drawn.temperature, drawn.num_beams) == (0.5, 1)
    assert parse(engine, flags, num_beams=5).num_beams == 5
    assert parse(engine, flags, num_beams=1).temperature == 0
    found = parse(engine, Sampling(), num_beams=2)
    assert (found.temperature, found.num_beams) == (0, 2)
    assert parse(engine, Sampling(), temperature=0, num_beams=2) == found
    assert parse(engine, Sampling(), num_beams=1) == Sampling()


def test_prompt_whose_beams_have_no_room_is_refused(address):
    body = question("a b " * 1500, num_beams=16)
    status, reply = post(address, json.dumps(body).encode())
    assert status == 400 and "lower num_beams" in reply["error"]["message"]


def test_client_that_leaves_ends_its_search(address, engine):
    engine.steps.clear()
    connection = connect(address)
    connection.sendall(whole(question("What?", max_tokens=2000, num_beams=4)))
    deadline = time.monotonic() + WITHIN_S
    while len(engine.steps) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    connection.close()
    # The next search gets its turn only when that one has ended.
    body = question("What?", max_tokens=2, num_beams=2)
    assert post(address, json.dumps(body).encode())[0] == 200
    assert 5 <= len(engine.steps) < 2000


def test_searches_run_one_at_a_time_and_leave_slots_to_others():
    async def check() -> None:
        places, log = Places(concurrency=2, queue=9), []
        ends = {name: asyncio.Event() for name in "abcd"}

        async def run(name: str, *, is_large: bool) -> None:
            async with places.slot(is_large=is_large):
                log.append(name)
                await ends[name].wait()

        tasks = {}
        for name, is_large in (("a", True), ("b", True), ("c", True), ("d", False)):
            tasks[name] = asyncio.create_task(run(name, is_large=is_large))
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert log == ["a", "d"]  # "b" and "c" hold no slot while they wait
        tasks["b"].cancel()
        ends["a"].set()
        await asyncio.sleep(0.01)
        assert log == ["a", "d", "c"]
        for name in "cd":
            ends[name].set()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks["b"]
        await asyncio.gather(tasks["a"], tasks["c"], tasks["d"])
        async with places.slot(is_large=True), places.slot():
            pass

    asyncio.run(asyncio.wait_for(check(), WITHIN_S))
