"""If this fails, answers that are decoded together depend on one another, wait for one another, or
fail with one another.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.tiny_vlm import NEW_TOKENS, conversations, make_loaded, never_end

from model.generation import batch, prefill, shelves
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
    {"temperature": 0, "ignore_eos": True, "max_new_tokens": 40},
]
LONG = Sampling(max_new_tokens=30_000, temperature=0)
TIMEOUT_S = 300


def sampling_of(fields: dict) -> Sampling:
    return Sampling(**{"max_new_tokens": NEW_TOKENS, "top_p": 0.95} | fields)


def read(streams: Streams) -> tuple[Answer, list]:
    for _ in streams:
        pass
    return streams.answers[0], streams.scores(0, slice(None))


def all_at_once(engine: VLMEngine, asked: list) -> list:
    """Answers and scores, or what was raised."""

    def one(question: tuple):
        try:
            return read(engine.choices(*question[0], question[1]))
        except (RuntimeError, OutOfMemory) as error:
            return error

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(one, asked))


def check_same(found: list, expected: list) -> None:
    """The same tokens; their log probabilities differ by rounding."""
    for (answer, scores), (other, others) in zip(found, expected, strict=True):
        assert answer == other
        assert [s.token_id for s in scores] == [s.token_id for s in others]
        for score, own in zip(scores, others, strict=True):
            assert score.logprob == pytest.approx(own.logprob, abs=1e-4)
            assert len(score.likeliest) == len(own.likeliest)


def wait_until(is_so) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture(scope="module")
def endless(assets) -> VLMEngine:
    loaded = make_loaded(assets)
    never_end(loaded.model)
    return VLMEngine(loaded)


@pytest.fixture(autouse=True)
def small_shelves(monkeypatch):
    """Rows outgrow them."""
    monkeypatch.setattr(shelves, "SMALLEST", 32)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(own, marks=pytest.mark.slow if own.get("use_moe") else ())
        for own in KINDS.values()
    ],
    ids=KINDS.keys(),
)
def test_each_gets_the_answer_that_it_gets_alone(assets, fields, monkeypatch):
    """Texts and pictures, in fewer places than there are questions, some prompts in pieces."""
    monkeypatch.setattr(prefill, "PIECE", 40)
    engine, samples = VLMEngine(make_loaded(assets, **fields)), conversations()
    asked = [(samples[i % 3], sampling_of(way)) for i, way in enumerate(WAYS)]
    expected = [read(engine.choices(*sample, sampling)) for sample, sampling in asked]
    assert len({answer.text for answer, _ in expected}) > len(asked) // 2
    check_same(all_at_once(engine.batched(5), asked), expected)


@pytest.mark.parametrize("kind", ["raises", "gives NaN"])
def test_row_that_fails_leaves_and_the_others_go_on(endless, kind):
    """Its token breaks the model in the midst of its answer; who takes its place is safe too."""
    questions = ["What is a circle?", "What is red?", "Say something.", "Where is it?"]
    sampling = Sampling(NEW_TOKENS, temperature=0, num_logprobs=0)
    asked = [((ask(text, num_images=0), []), sampling) for text in questions]
    expected = all_at_once(endless, asked)
    said = [[score.token_id for score in scores] for _, scores in expected]
    others = {token for ids in said[1:] for token in ids}
    poison = next(token for token in said[0][3:] if token not in others)

    def break_the_model(_module, args, embedded):
        if args[0].ndim == 1 and poison in args[0]:  # a step, not a prompt
            if kind == "raises":
                raise RuntimeError("broken on purpose")
            embedded[args[0] == poison] = torch.nan

    hook = endless.model.model.embed_tokens.register_forward_hook(break_the_model)
    try:
        shared = endless.batched(3)
        failed, *found = all_at_once(shared, asked)
        with pytest.raises(RuntimeError, match="broken on purpose|not finite"):
            raise failed
        check_same(found, expected[1:])
        check_same(all_at_once(shared, asked[1:]), expected[1:])
    finally:
        hook.remove()


def test_prompt_that_fails_fails_alone(endless):
    """Short prompts begin together; the one that breaks the model takes no other along."""
    sampling = sampling_of({"max_new_tokens": 4, "seed": 1})
    asked = [((ask(text, num_images=0), []), sampling) for text in ("A?", "B?", "Zz!", "D?")]
    expected = all_at_once(endless, asked)
    ids = endless.processor.tokenizer("Zz!", add_special_tokens=False)["input_ids"]
    sizes = []

    def break_the_model(_module, args, _embedded):
        if args[0].ndim == 2:
            sizes.append(len(args[0]))
            if any(ids[0] in row and ids[-1] in row for row in args[0]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")

    hook = endless.model.model.embed_tokens.register_forward_hook(break_the_model)
    try:
        shared = endless.batched(8)
        with shared._batch._lock:  # nobody begins before all have come
            pool = ThreadPoolExecutor(1)
            found = pool.submit(all_at_once, shared, asked)
            time.sleep(0.5)
        first, second, failed, last = found.result(TIMEOUT_S)
        check_same([first, second, last], [expected[i] for i in (0, 1, 3)])
        assert isinstance(failed, OutOfMemory) and "8.00 GiB" in str(failed)
        assert max(sizes) > 1
    finally:
        hook.remove()


def test_row_without_room_to_grow_fails_alone(endless, monkeypatch):
    asked = [((ask("What?", num_images=0), []), Sampling(n, temperature=0)) for n in (4, 60, 5)]
    expected = all_at_once(endless, asked)

    def full(_self, _owner):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(shelves.Shelves, "move", full)
    first, failed, last = all_at_once(endless.batched(3), asked)
    check_same([first, last], [expected[0], expected[2]])
    assert isinstance(failed, OutOfMemory) and "--batch" in str(failed)


def test_answers_end_where_their_readers_say_so(endless):
    """Closed, cancelled while one reads, and while one waits: the others and the thread notice."""
    shared, question = endless.batched(2), (ask("What?", num_images=0), [])
    cancels = [threading.Event() for _ in range(3)]
    streams = [shared.stream(*question, LONG, cancel=cancel) for cancel in cancels]
    begun = [next(stream) for stream in streams[:2]]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, streams[2])  # two places are taken
        wait_until(lambda: shared._batch._waiting)
        cancels[2].set()
        assert waiting.result(TIMEOUT_S) == []
    cancels[0].set()
    said = begun[0] + "".join(streams[0])
    assert streams[0].answer.finish_reason == "cancelled" and streams[0].answer.text == said
    short = sampling_of({"temperature": 0})
    (expected,) = endless.generate([question], short)
    assert read(shared.choices(*question, short))[0] == expected  # in the place that is free
    streams[1].close()
    assert streams[1].answer.num_new_tokens <= 2  # what was read, not what was computed
    wait_until(lambda: shared._batch._thread is None)
    assert read(shared.choices(*question, short))[0] == expected  # begins again


def test_many_long_answers_take_no_more_memory_than_two(endless):
    """A third one waits until the tokens of the others are given back, whatever places are free."""
    shared, question = endless.batched(8), (ask("What?", num_images=0), [])
    long = [shared.stream(*question, LONG) for _ in range(3)]
    for stream in long[:2]:
        next(stream)
    long[2]._decoder.listen(lambda: None)
    time.sleep(0.2)
    assert not long[2]._decoder.has_arrived
    long[0].close()
    next(long[2])
    for stream in long[1:]:
        stream.close()


def test_who_waits_too_long_is_told(endless, monkeypatch):
    monkeypatch.setattr(batch, "MAX_WAIT_S", 0.05)
    shared, question = endless.batched(1), (ask("What?", num_images=0), [])
    with shared.stream(*question, LONG) as first:
        next(first)
        with pytest.raises(TimeoutError, match="try again later"):
            next(shared.stream(*question, LONG))
