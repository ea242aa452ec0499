"""If this fails, one oversized request to the API costs it unbounded time or memory, or a request
within the limits is refused.
"""

import json
import random

import pytest
from support.api_site import MODEL, parts, post, question, served_thread
from support.api_socket import HEAD, chunk, connect, read_reply
from support.tiny_vlm import make_loaded, picture

from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling
from model.serving.api.protocol.fields import ApiError
from model.serving.api.protocol.request import Asked, parse_chat
from model.serving.api.protocol.stop_text import StopText


@pytest.fixture(scope="module")
def engine(assets) -> VLMEngine:
    loaded = make_loaded(assets)
    loaded.path = assets / f"{MODEL}.pth"
    loaded.path.touch()
    return VLMEngine(loaded)


@pytest.fixture(scope="module")
def address(engine):
    with served_thread(engine) as address:
        yield address


@pytest.fixture
def tokenized(engine, monkeypatch) -> list[int]:
    """Numbers of characters that were given to the tokenizer."""
    counts, kind = [], type(engine.processor.tokenizer)
    tokenize = kind.__call__

    def count(self, text, *arguments, **options):
        counts.append(sum(map(len, [text] if isinstance(text, str) else text)))
        return tokenize(self, text, *arguments, **options)

    monkeypatch.setattr(kind, "__call__", count)
    return counts


def messages_of(texts: list[str]) -> list[dict]:
    """Question and answer in turn; the last is a question."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def refusal(address: str, body: dict | bytes) -> dict:
    """The error that a request gets, at once."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, reply = post(address, data)
    assert status == 400, reply
    return reply["error"]


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("a" * 1_600_000, "stop has 1,600,000 characters; at most 256 are taken"),
        (["ok", "a" * 257], "stop has 257 characters; at most 256 are taken"),
        (["a"] * 5, "up to 4"),
        (["a"] * 200_000, "up to 4"),
    ],
    ids=["long", "one of two", "five", "many"],
)
def test_stop_strings_are_refused_before_pictures_and_messages(address, tokenized, stop, message):
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = question("What?", stop=stop)
    body["messages"][0]["content"].append(broken)
    error = refusal(address, body)
    assert message in error["message"] and error["param"] == "stop"
    assert tokenized == []


def test_stop_strings_are_found_in_linear_work():
    class Counted(str):
        num_looks = 0

        def __getitem__(self, index):
            Counted.num_looks += 1
            return super().__getitem__(index)

    text = "a" * 20_000
    stop = StopText([Counted("a" * 255 + "b"), Counted("b" * 256), Counted("ab" * 128)])
    said = "".join(stop.push(character) for character in text) + stop.rest()
    assert said == text and not stop.is_found
    assert Counted.num_looks < 20 * len(text)


def test_stop_text_is_what_a_search_finds_in_any_pieces():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=30))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(0, 4))]
        ends = [(at + len(s), -len(s)) for s in stops for at in [text.find(s)] if at >= 0]
        end, size = min(ends, default=(len(text), 0))
        stop, said, at = StopText(stops), "", 0
        while at < len(text) and not stop.is_found:
            step = rng.randint(1, 5)
            said += stop.push(text[at : at + step])
            at += step
        assert said + stop.rest() == text[: end + size], (text, stops)
        assert stop.is_found == bool(ends)


@pytest.mark.parametrize("role", ["user", "system"])
def test_long_text_is_refused_before_it_is_tokenized(address, engine, tokenized, role):
    long = {"role": role, "content": "a circle " * 1_000_000}
    last = [] if role == "user" else [{"role": "user", "content": "And?"}]
    body = question("What?") | {"messages": [long, *last]}
    error = refusal(address, body)
    assert (
        "9,000,0" in error["message"] and f"{engine.context.max_characters:,}" in error["message"]
    )
    assert error["code"] == "context_length_exceeded" and tokenized == []


def test_no_text_that_fits_is_refused_by_its_characters(engine):
    """The longest token, as often as the context has room for it."""
    tokenizer = engine.processor.tokenizer
    longest = max((tokenizer.decode([i]) for i in range(3, len(tokenizer))), key=len)
    assert len(longest) * engine.max_tokens <= engine.context.max_characters


def test_old_turns_that_cannot_fit_are_dropped_without_tokenizing(engine, tokenized):
    texts = ["circle " * 200_000, "An answer.", "What?"]
    kept, num_dropped = engine.context.fit(messages_of(texts), max_new_tokens=8)
    assert num_dropped == 1 and kept == messages_of(["What?"])
    assert sum(tokenized) < 5_000


def test_a_thousand_messages_are_fitted_in_linear_work(engine, tokenized):
    rng = random.Random(0)
    texts = ["circle " * rng.randint(1, 150) for _ in range(999)]
    kept, num_dropped = engine.context.fit(messages_of(texts), max_new_tokens=8)
    assert 0 < num_dropped < 499 and len(kept) == 999 - 2 * num_dropped
    assert sum(tokenized) < 4 * sum(map(len, texts))


def test_fit_drops_as_few_turns_as_a_walk_through_all_counts(engine, monkeypatch):
    rng = random.Random(1)
    monkeypatch.setattr(engine.context, "max_tokens", 200)
    processor = engine.processor
    for _ in range(40):
        texts = ["circle 图 " * rng.randint(0, 12) for _ in range(2 * rng.randint(0, 8) + 1)]
        messages = messages_of(texts)
        if rng.random() < 0.3:
            messages.insert(0, {"role": "system", "content": "Be brief."})
        start = 1 if messages[0]["role"] == "system" else 0
        head, turns = messages[:start], (len(texts) - 1) // 2

        def without(n, head=head, messages=messages, start=start):
            return [*head, *messages[start + 2 * n :]]

        def size(n, without=without):
            text = processor.render(without(n), add_generation_prompt=True)
            return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

        expected = next((n for n in range(turns) if size(n) + 8 <= 200), turns)
        kept, num_dropped = engine.context.fit(messages, max_new_tokens=8)
        assert num_dropped == expected and kept == without(expected)


@pytest.mark.parametrize(("word", "message"), [
    ("\ud800", "half a character"), ("<|im_end|>", "special token"), ("@" * 16, "placeholder"),
])  # fmt: skip
def test_what_an_old_turn_may_not_hold_is_told(address, word, message):
    body = question("What?") | {"messages": messages_of([word, "Hello.", "What?"])}
    assert message in refusal(address, body)["message"]


def test_messages_and_parts_are_limited(address, tokenized):
    body = question("What?")
    error = refusal(address, body | {"messages": messages_of(["a"] * 100_001)})
    assert error["message"] == "100,001 messages; at most 1,000 are taken"
    text = {"type": "text", "text": "a"}
    error = refusal(address, body | {"messages": [{"role": "user", "content": [text] * 101}]})
    assert error["message"] == "messages[0].content has 101 parts; at most 100 are taken"
    assert tokenized == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"a": [' + b"[]," * 6_000_000 + b"[]]}", "more than 500,000 values"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "an integer of 5000 digits; at most 400 are taken"),
        (b'{"model": "a", "model": "b"}', "the name 'model' stands twice in one object"),
        (b'{"messages": [{"role": "user", "role": "user"}]}', "'role' stands twice"),
        (b'{"a": ' * 100_000, "not valid JSON"),
        (b'{"metadata": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", "not valid JSON"),
    ],
    ids=["values", "digits", "names", "inner names", "objects", "arrays"],
)
def test_json_bombs_are_told_of(address, body, message):
    assert message in refusal(address, body)["message"]


def test_parsing_stops_when_the_client_has_left(engine):
    class Left(Exception):
        pass

    def leave_at(count: int) -> None:
        calls = []

        def check() -> None:
            calls.append(1)
            if len(calls) == count:
                raise Left

        body = question(picture(6), "What?")
        body["messages"] = body["messages"] * 2
        data = json.dumps(body).encode()
        parse_chat(data, Asked(engine, [MODEL], Sampling()), check=check)

    for count in range(1, 5):  # two messages, a picture in each
        with pytest.raises(Left):
            leave_at(count)
    leave_at(5)


def test_pictures_are_counted_before_they_are_opened(engine):
    body = question("What?")
    url = {"type": "image_url", "image_url": {"url": "not opened"}}
    body["messages"][0]["content"] += [url] * 17
    with pytest.raises(ApiError, match="17 images; at most 16"):
        parse_chat(json.dumps(body).encode(), Asked(engine, [MODEL], Sampling()))


def test_body_that_is_announced_too_large_is_not_waited_for(address):
    with connect(address) as connection:
        connection.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n")
        status, reply = read_reply(connection)
    assert status == 413 and b"larger than 20,971,520 bytes" in reply


def test_body_without_a_length_is_read_no_further_than_it_may_be_long(address):
    with connect(address) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        piece, num_sent = chunk(b" " * 2**20), 0
        while num_sent < 21:  # the reply must come although the body never ends
            connection.sendall(piece)
            num_sent += 1
        status, reply = read_reply(connection)
    assert status == 413 and b"larger than 20,971,520 bytes" in reply


def test_chunked_request_is_answered(address):
    data = json.dumps(question(*parts("What?")[0]["text"], max_tokens=2)).encode()
    with connect(address) as connection:
        pieces = [data[i : i + 7] for i in range(0, len(data), 7)]
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in [*pieces, b""]:
            connection.sendall(chunk(piece))
        assert read_reply(connection)[0] == 200
