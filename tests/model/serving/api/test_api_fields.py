"""If this fails, a field that clients of the OpenAI protocol send is ignored, refused or answered
in another form than the protocol's.
"""

import base64
import json

import openai
import pytest
from support.api_site import MODEL, data_url, endless_engine, post, question, served_thread
from support.api_socket import connect, read_reply
from support.tiny_vlm import picture

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling

GREEDY = {"temperature": 0, "max_tokens": 12}
PLAIN = Sampling(12, temperature=0)
ENTRY = {"role": "user", "content": "What?"}


@pytest.fixture(scope="module")
def engine(assets) -> VLMEngine:
    return endless_engine(assets)


@pytest.fixture(scope="module")
def address(engine):
    with served_thread(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0)


def said(address: str, **fields) -> str:
    """The answer to a request; fields of None are left out."""
    body = {k: v for k, v in (question("What?") | GREEDY | fields).items() if v is not None}
    status, reply = post(address, json.dumps(body).encode())
    assert status == 200, reply
    return reply["choices"][0]["message"]["content"]


def refused(address: str, path: str = "/chat/completions", **fields) -> dict:
    status, reply = post(address, json.dumps(fields).encode(), path=path)
    assert 400 <= status < 500, reply
    return reply["error"]


def test_several_answers_are_those_of_the_seeds_that_follow(client, engine):
    settings = {"temperature": 1.0, "max_tokens": 12, "seed": 5}
    reply = client.chat.completions.create(**question(picture(6), "What?"), **settings, n=3)
    sample = (ask("What?", num_images=1), [picture(6)])
    expected = [
        engine.generate([sample], Sampling(12, 1.0, engine_top_p(), seed=5 + i))[0].text
        for i in range(3)
    ]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [choice.message.content for choice in reply.choices] == expected
    assert len(set(expected)) > 1
    assert reply.usage.completion_tokens == 36 and reply.usage.prompt_tokens < 100
    options = {"stream": True, "stream_options": {"include_usage": True}, "n": 3}
    chunks = list(
        client.chat.completions.create(**question(picture(6), "What?"), **settings, **options)
    )
    texts, reasons = ["", "", ""], []
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == expected and reasons == ["length"] * 3
    assert chunks[-1].usage == reply.usage


def engine_top_p() -> float:
    return Sampling().top_p


def test_stop_string_ends_only_the_answer_that_holds_it(client):
    settings = question("What?") | {"temperature": 1.0, "max_tokens": 12, "seed": 5, "n": 3}
    full = [c.message.content for c in client.chat.completions.create(**settings).choices]
    stop = next(full[0][i : i + 2] for i in range(2, 9) if full[0][i : i + 2] not in full[1])
    cut = client.chat.completions.create(**settings, stop=stop).choices
    assert cut[0].message.content == full[0][: full[0].index(stop)]
    assert cut[1].message.content == full[1]
    assert [c.finish_reason for c in cut][:2] == ["stop", "length"]


def test_chat_logprobs_spell_the_answer(client):
    body = question("图像里有什么？") | GREEDY
    plain = client.chat.completions.create(**body).choices[0]
    assert plain.logprobs is None
    asked = {"logprobs": True, "top_logprobs": 2}
    choice = client.chat.completions.create(**body, **asked).choices[0]
    content = choice.logprobs.content
    assert choice.message.content == plain.message.content and len(content) == 12
    spelt = bytes(byte for entry in content for byte in entry.bytes)
    assert spelt.decode(errors="ignore").startswith(choice.message.content[:5])
    for entry in content:
        likeliest = entry.top_logprobs
        assert len(likeliest) == 2 and likeliest[0].logprob >= likeliest[1].logprob
        assert entry.token == likeliest[0].token  # greedy takes the likeliest
        assert entry.logprob == likeliest[0].logprob <= 0
    stop = choice.message.content[4:6]
    told = []
    for chunk in client.chat.completions.create(**body, **asked, stop=stop, stream=True):
        told += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    cut = client.chat.completions.create(**body, **asked, stop=stop).choices[0]
    assert told == cut.logprobs.content == content[: len(told)] and 0 < len(told) < 12
    none = client.chat.completions.create(**body, logprobs=True).choices[0]
    assert [entry.top_logprobs for entry in none.logprobs.content] == [[]] * 12


def test_completions_go_on_from_texts_and_ids(client, engine):
    prompt = engine.processor.render(ask("What?", num_images=0), add_generation_prompt=True)
    ids = engine.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    (expected,) = engine.generate([(ask("What?", num_images=0), [])], PLAIN)
    for one in (prompt, ids):
        reply = client.completions.create(model=MODEL, prompt=one, **GREEDY)
        (choice,) = reply.choices
        assert (choice.text, choice.finish_reason) == (expected.text, "length")
        assert reply.usage.prompt_tokens == len(ids) and reply.id.startswith("cmpl-")
    several = client.completions.create(model=MODEL, prompt=["a circle", prompt], **GREEDY, n=2)
    assert [c.text for c in several.choices][2:] == [expected.text] * 2
    streamed = client.completions.create(
        model=MODEL, prompt=prompt, **GREEDY, stream=True, echo=False
    )
    chunks = list(streamed)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_completions_tell_logprobs_in_their_form(client):
    asked = {"model": MODEL, "prompt": "a circle", "logprobs": 2} | GREEDY
    choice = client.completions.create(**asked).choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 12
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    for token, logprob, likeliest in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert likeliest[token] == logprob == max(likeliest.values())
    for offset, token in zip(told.text_offset, told.tokens, strict=True):
        at = choice.text.find(token, offset)  # behind bytes that turned out to be no character
        assert "\ufffd" in token or token.startswith("<|") or 0 <= at - offset <= 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt must be a text"),
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": ["a"] * 17}, "17 prompts; at most 16 are taken"),
        ({"prompt": [["a"]]}, "arrays of ids from 0 to"),
        ({"prompt": [True]}, "arrays of ids from 0 to"),
        ({"prompt": [[-1]]}, "arrays of ids from 0 to"),
        ({"prompt": ""}, "the prompt has 0 tokens"),
        ({"prompt": "circle " * 200_000}, "the prompt has 1,400,000 characters"),
        ({"prompt": "a b " * 1500, "n": 16}, "lower n"),
        ({"prompt": ["a"] * 6, "n": 3}, "n times the number of prompts must be 1 to 16"),
        ({"prompt": "a", "n": 2, "max_tokens": 20_000}, "2 answers of max_tokens 20000 are 40,000"),
        ({"prompt": "a", "echo": True}, "echo is not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ({"prompt": "a", "best_of": 2}, "best_of must be n"),
        ({"prompt": "a", "logprobs": 6}, "logprobs must be from 0 to 5"),
        ({"prompt": "a", "messages": []}, "unrecognized request argument: messages"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_in_completions_are_told(address, fields, message):
    body = {"model": MODEL, "prompt": "a", "max_tokens": 2} | fields
    assert message in refused(address, "/completions", **body)["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 20_000}, "logprobs", "420,000 log"),
        ({"logprobs": True, "num_beams": 2}, "logprobs", "logprobs does not go with num_beams 2"),
        ({"response_format": {"type": "json_object"}}, "response_format", '{"type": "text"}'),
        ({"min_p": 2}, "min_p", "min_p must be from 0 to 1"),
        ({"min_tokens": 13}, "min_tokens", "min_tokens must be from 0 to the longest answer, 12"),
        ({"stop_token_ids": [400]}, "stop_token_ids", "ids from 0 to 399"),
        ({"stop_token_ids": [3] * 17}, "stop_token_ids", "up to 16 ids"),
        ({"ignore_eos": 1}, "ignore_eos", "ignore_eos must be true or false"),
        ({"repeat_penalty": 2, "repetition_penalty": 3}, "repetition_penalty", "the same setting"),
        ({"tools": [{"type": "function"}]}, "tools", 'set tool_choice to "none"'),
        ({"tools": [{}], "tool_choice": "auto"}, "tools", "tools is not supported"),
        ({"n": 0}, "n", "must be 1 to 16"),
        ({"continue_final_message": True}, "continue_final_message", "must be false"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_in_chat_completions_are_told(address, fields, param, message):
    error = refused(address, **(question("What?") | GREEDY | fields))
    assert error["param"] == param and message in error["message"]


def test_settings_change_the_answer(address, engine):
    plain = said(address)
    for fields, own in (
        ({"repeat_penalty": 2.0}, {"repetition_penalty": 2.0}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"stop_token_ids": [37, 45]}, {"stop_token_ids": (37, 45)}),
        ({"min_tokens": 12, "ignore_eos": True}, {"min_tokens": 12, "ignore_eos": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
    ):
        sampling = Sampling(12, temperature=0, **own)
        (expected,) = engine.generate([(ask("What?", num_images=0), [])], sampling)
        assert said(address, **fields) == expected.text, fields
    assert said(address, repeat_penalty=2.0) != plain
    assert said(address, temperature=1.0, min_p=1.0) == plain  # the likeliest alone
    assert said(address, tools=[{"type": "function"}], tool_choice="none") == plain
    assert said(address, functions=[{"name": "f"}], function_call="none") == plain
    assert said(address, response_format={"type": "text"}, echo=False) == plain
    assert said(address, chat_template_kwargs={"enable_thinking": False}) == plain


def test_begun_answer_is_continued(address, engine):
    begun = {"role": "assistant", "content": "A red"}
    (expected,) = engine.generate([([ENTRY, begun], [])], PLAIN)
    for fields in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        assert said(address, messages=[ENTRY, begun], **fields) == expected.text
    assert said(address, messages=[ENTRY, begun | {"content": ""}]) == said(address)
    assert said(address, messages=[ENTRY, begun | {"content": None}]) == said(address)


def test_answer_without_content_may_stand_in_the_history(address):
    call = {"role": "assistant", "content": None, "refusal": None}
    empty = call | {"content": ""}
    assert said(address, messages=[ENTRY, call, ENTRY]) == said(
        address, messages=[ENTRY, empty, ENTRY]
    )
    assert (
        "must be a string"
        in refused(address, model=MODEL, messages=[{"role": "user", "content": None}])["message"]
    )


def test_pictures_come_in_many_spellings(address):
    url = data_url(picture(6))
    head, _, data = url.partition(",")
    lines = base64.encodebytes(base64.b64decode(data)).decode()
    assert "\n" in lines

    def content(image_url) -> list[dict]:
        part = {"type": "image_url", "image_url": image_url}
        return [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]

    expected = said(address, messages=content({"url": url, "detail": "auto"}))
    assert expected != said(address)
    for other in (
        url,
        {"url": f"{head},{lines}"},
        {"url": url.rstrip("=")},
        f"{head},{lines}".strip("=\n"),
    ):
        assert said(address, messages=content(other)) == expected
    padded = base64.b64encode(base64.b64decode(data) + b"\0").decode()  # another number of =
    assert said(address, messages=content(f"{head},{padded.rstrip('=')}")) == expected


def test_model_answers_to_its_names(address, client):
    plain = said(address)
    for name in (MODEL, "sft_vlm", "default"):
        assert said(address, model=name) == plain
        assert client.models.retrieve(name).id == MODEL
    assert [model.id for model in client.models.list()] == [MODEL]
    error = refused(address, **(question("What?") | {"model": "sft"}))
    assert error["code"] == "model_not_found" and f"this server has '{MODEL}'" in error["message"]


def test_stored_completions_path_keeps_the_limits_of_a_body(address):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with connect(address) as connection:
        connection.sendall(head + b"Content-Length: 99999999999\r\n\r\n")
        status, reply = read_reply(connection)
    assert status == 413 and b"larger than 20,971,520 bytes" in reply
