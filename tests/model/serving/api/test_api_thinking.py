"""If this fails, a client of `web_demo.py --api` gets thinking as an answer, loses it, or a model
that does not think answers otherwise than before.
"""

import json

import openai
import pytest
from support.api_site import MODEL, post, question, served_thread
from support.third_generation import make_assets3, make_it_say, make_loaded3
from support.tiny_vlm import make_loaded, picture

from model.generation.engine import VLMEngine

THINK = {"chat_template_kwargs": {"open_thinking": True}}
SAID = ("It is\nred.\n", "</think>", "\n\nRed 红色, it is.")


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> VLMEngine:
    folder = tmp_path_factory.mktemp("api3")
    make_assets3(folder)
    loaded = make_loaded3(folder)
    loaded.path = folder / f"{MODEL}.pth"
    loaded.path.touch()
    loaded.num_said = len(make_it_say(loaded, *SAID))
    engine = VLMEngine(loaded)
    engine.num_said = loaded.num_said
    return engine


@pytest.fixture(scope="module")
def address(engine):
    with served_thread(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0)


def test_thinking_is_the_reasoning_content(client, engine):
    reply = client.chat.completions.create(**question(picture(6), "What?"), extra_body=THINK)
    message = reply.choices[0].message
    assert message.content == "Red 红色, it is." and message.reasoning_content == "It is\nred."
    assert reply.usage.completion_tokens == engine.num_said  # the thinking is generated too
    assert reply.choices[0].finish_reason == "stop"


def test_streamed_thinking_comes_first_and_apart(client, engine):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**question("What?"), **options, extra_body=THINK))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thought = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    said = [delta.content or "" for delta in deltas]
    assert "".join(thought) == "It is\nred." and "".join(said) == "Red 红色, it is."
    assert sum(map(bool, thought)) > 1 and not any(a and b for a, b in zip(thought, said, strict=1))
    assert max(i for i, t in enumerate(thought) if t) < min(i for i, s in enumerate(said) if s)
    assert chunks[-1].usage.completion_tokens == engine.num_said


def test_thinking_that_does_not_end_is_an_empty_answer(client):
    body = question("What?", max_tokens=3, temperature=0)
    reply = client.chat.completions.create(**body, extra_body=THINK)
    (choice,) = reply.choices
    thought = choice.message.reasoning_content
    assert choice.message.content == "" and thought and "It is\nred.".startswith(thought)
    assert choice.finish_reason == "length" and reply.usage.completion_tokens == 3


def test_stop_strings_are_sought_in_the_answer(client):
    body = question("What?", stop=["red", "it"])
    message = client.chat.completions.create(**body, extra_body=THINK).choices[0].message
    assert message.content == "Red 红色, " and message.reasoning_content == "It is\nred."


def test_history_loses_its_thinking(client, engine, monkeypatch):
    asked, choices = [], VLMEngine.choices

    def recorded(self, messages, *args, **options):
        asked.append(messages)
        return choices(self, messages, *args, **options)

    monkeypatch.setattr(VLMEngine, "choices", recorded)
    said = {"role": "assistant", "content": "<think>\nsecret\n</think>\n\nRed."}
    echoed = {"role": "assistant", "content": "Red.", "reasoning_content": "secret"}
    ask = {"role": "user", "content": "What?"}
    for entry in (said, echoed):
        client.chat.completions.create(model=MODEL, messages=[ask, entry, ask], max_tokens=1)
        assert asked.pop()[1] == {"role": "assistant", "content": "Red."}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"open_thinking": 1}, "open_thinking must be true or false"),
        ({"enable_thinking": "yes"}, "enable_thinking must be true or false"),
        ({"open_thinking": True, "enable_thinking": False}, "contradict each other"),
        ({"thinking": True}, "thinking is not supported; only open_thinking is"),
        (["open_thinking"], "chat_template_kwargs must be an object"),
    ],
)
def test_other_options_are_refused(options, message, address):
    body = question("What?") | {"chat_template_kwargs": options}
    status, reply = post(address, json.dumps(body).encode())
    assert status == 400 and message in reply["error"]["message"]
    assert reply["error"]["param"] == "chat_template_kwargs"


def test_second_generation_answers_as_ever(assets, tmp_path):
    loaded = make_loaded(assets)
    loaded.path = tmp_path / f"{MODEL}.pth"
    loaded.path.touch()
    text = "<think>\na\n</think>\n\nb"
    make_it_say(loaded, text)
    with served_thread(VLMEngine(loaded)) as address:
        status, reply = post(address, json.dumps(question("What?") | THINK).encode())
        assert status == 400 and "generation 2 does not think" in reply["error"]["message"]
        for options in ({}, {"chat_template_kwargs": {"open_thinking": False}}):
            _, reply = post(address, json.dumps(question("What?") | options).encode())
            assert reply["choices"][0]["message"] == {
                "role": "assistant",
                "content": text,
                "refusal": None,
            }
