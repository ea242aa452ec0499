"""If this fails, answers that are decoded together depend on one another, wait for one another, or
fail with one another.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.tiny_vlm import NEW_TOKENS, conversations, make_loaded, never_end

from model.generation import prefill, shelves
from model.generation.batch import Batch
from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.generation.stream import Answer, Streams
from model.machine.device import OutOfMemory

KINDS = {
    "dense": {},
    "moe": {"use_moe": True},
    "third": {"generation": 3},
    "third moe": {"generation": 3, "use_moe": True},
}
# Each asks in another way: lengths, draws, penalties, ends and log probabilities of its own.
WAYS = [
    {"temperature": 0},
    {"temperature": 0, "max_new_tokens": 3},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2},
    {"temperature": 0.7, "top_p": 0.9, "seed": 3, "num_logprobs": 2},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.01, "seed": 4, "repetition_penalty": 1.3},
    {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "num_logprobs": 0},
    {"temperature": 1.0, "top_p": 1.0, "seed": 5, "min_tokens": 20},
    {"temperature": 0, "ignore_eos": True},
]
TIMEOUT_S = 100


def sampling_of(fields: dict) -> Sampling:
    return Sampling(**{"max_new_tokens": NEW_TOKENS, "top_p": 0.95} | fields)


def read(streams: Streams) -> tuple[Answer, list]:
    for _ in streams:
        pass
    return streams.answers[0], streams.scores(0, slice(None))


def all_at_once(engine: VLMEngine, asked: list) -> list[tuple[Answer, list]]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda one: read(engine.choices(*one[0], one[1])), asked))


def is_same(found: list, expected: list) -> bool:
    """The same tokens; their log probabilities differ by rounding."""
    for (answer, scores), (other, others) in zip(found, expected, strict=True):
        assert answer == other
        assert [s.token_id for s in scores] == [s.token_id for s in others]
        for score, own in zip(scores, others, strict=True):
            assert score.logprob == pytest.approx(own.logprob, abs=1e-4)
            assert len(score.likeliest) == len(own.likeliest)
    return True


@pytest.fixture(scope="module")
def endless(assets) -> VLMEngine:
    loaded = make_loaded(assets)
    never_end(loaded.model)
    return VLMEngine(loaded)


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())
def test_each_gets_the_answer_that_it_gets_alone(assets, fields, monkeypatch):
    """Texts and pictures, in fewer places than there are questions, on shelves that they outgrow,
    their prompts in many pieces."""
    monkeypatch.setattr(shelves, "SMALLEST", 4)
    monkeypatch.setattr(prefill, "PIECE", 7)
    engine = VLMEngine(make_loaded(assets, **fields))
    asked = [(sample, sampling_of(way)) for way in WAYS for sample in conversations()]
    expected = [read(engine.choices(*sample, sampling)) for sample, sampling in asked]
    assert len({answer.text for answer, _ in expected}) > len(asked) // 2
    assert is_same(all_at_once(engine.batched(5), asked), expected)
