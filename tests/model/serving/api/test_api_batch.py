"""If this fails, clients of the server that ask at the same time get other answers than alone, or
one that leaves, fails or attacks takes the others along.
"""

import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.api_site import TIMEOUT_S, endless_engine, malformed, post, question, served_thread
from support.tiny_vlm import picture

from model.generation.engine import ask
from model.generation.sampling import Sampling


@pytest.fixture(scope="module")
def engine(assets, tmp_path_factory):
    return endless_engine(assets)


def streamed(address: str, body: dict, *, num_events: int | None = None) -> str:
    """The text of a streamed answer; after so many events the client leaves."""
    host, _, prefix = address.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=TIMEOUT_S)
    headers = {"Content-Type": "application/json"}
    data = json.dumps(body | {"stream": True})
    connection.request("POST", f"/{prefix}/chat/completions", data, headers)
    text, seen = "", 0
    with connection.getresponse() as reply:
        assert reply.status == 200
        for line in reply:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                seen += 1
                if seen == num_events:
                    break
    connection.close()
    return text


def asked(number: int) -> tuple[dict, tuple, Sampling]:
    """A request, and how the engine is asked the same: no two of one length and way."""
    images = [picture(n + 5) for n in range(number % 3)]
    fields = {"max_tokens": 2 + 3 * number, "temperature": number % 2, "seed": number, "top_p": 0.9}
    if number % 4 == 1:
        fields |= {"repeat_penalty": 1.2, "presence_penalty": 0.5}
    sampling = Sampling(
        max_new_tokens=fields["max_tokens"],
        temperature=fields["temperature"],
        top_p=0.9,
        seed=number,
        repetition_penalty=fields.get("repeat_penalty", 1.0),
        presence_penalty=fields.get("presence_penalty", 0.0),
    )
    sample = (ask(f"What is {number}?", num_images=len(images)), images)
    return question(*images, f"What is {number}?", **fields), sample, sampling


def test_clients_at_once_get_their_answers_beside_bad_ones(engine):
    """Twelve good ones in five places; three that leave in the midst; one that attacks."""
    requests = [asked(number) for number in range(12)]
    expected = [engine.generate([sample], sampling)[0].text for _, sample, sampling in requests]
    assert len(set(expected)) == 12

    def attack(address: str, seed: int) -> list[int]:
        rng = random.Random(seed)
        return [post(address, malformed(rng))[0] for _ in range(15)]

    def one(address: str, number: int) -> str:
        body = requests[number][0]
        if number % 2:
            return streamed(address, body)
        status, reply = post(address, json.dumps(body).encode())
        assert status == 200, reply
        assert reply["usage"]["completion_tokens"] == body["max_tokens"]
        return reply["choices"][0]["message"]["content"]

    long = question("What is long?", max_tokens=30_000, temperature=0)
    with served_thread(engine, concurrency=5, queue=20) as address, ThreadPoolExecutor(20) as pool:
        leaving = [pool.submit(streamed, address, long, num_events=9 + n) for n in range(3)]
        attacked = pool.submit(attack, address, 0)
        good = [pool.submit(one, address, number) for number in range(12)]
        assert [answer.result(TIMEOUT_S) for answer in good] == expected
        assert all(future.result(TIMEOUT_S) for future in leaving)
        assert 400 in attacked.result(TIMEOUT_S) and max(attacked.result()) < 500
        deadline_s = time.monotonic() + TIMEOUT_S
        while any(thread.name == "batch" for thread in threading.enumerate()):
            assert time.monotonic() < deadline_s  # nothing is computed for those who have left
            time.sleep(0.05)


def test_stop_strings_and_log_probabilities_are_of_the_answer_alone(engine):
    sample, sampling = (ask("What is it?", num_images=0), []), Sampling(20, temperature=0)
    text = engine.generate([sample], sampling)[0].text
    stop = text[len(text) // 2 :][:3]
    told = {"max_tokens": 20, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    body = json.dumps(question("What is it?", **told, stop=[stop])).encode()
    other = json.dumps(question("Who?", **told)).encode()
    with served_thread(engine, concurrency=1) as address:
        alone = post(address, body)[1]
    with served_thread(engine, concurrency=4) as address, ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(post, address, other) for _ in range(3)]
        status, together = post(address, body)
        assert [one.result(TIMEOUT_S)[0] for one in busy] == [200] * 3
    assert status == 200 and together["usage"] == alone["usage"]
    assert together["choices"][0]["message"] == alone["choices"][0]["message"]
    assert alone["choices"][0]["message"]["content"] == text[: text.index(stop)]
    for found, own in zip(
        together["choices"][0]["logprobs"]["content"],
        alone["choices"][0]["logprobs"]["content"],
        strict=True,
    ):
        assert found["token"] == own["token"]
        assert found["logprob"] == pytest.approx(own["logprob"], abs=1e-4)
