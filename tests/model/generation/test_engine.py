"""If this fails, evaluation, chat, web page and server give wrong answers, answers that depend on
who asks at the same time, or none after an error.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.tiny_parts import TOKENIZER_TEXT
from support.tiny_vlm import (
    GREEDY,
    NEW_TOKENS,
    conversations,
    make_loaded,
    naive_greedy_ids,
    picture,
)

from model.generation.decoding import TextPieces
from model.generation.engine import VLMEngine, ask
from model.generation.sampler import Sampler
from model.generation.sampling import Sampling
from model.vlm_processor import load_tokenizer

SAMPLED = Sampling(NEW_TOKENS, temperature=1.0, top_p=0.95, seed=3)


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def engine(request, assets) -> VLMEngine:
    return VLMEngine(make_loaded(assets, use_moe=request.param))


@pytest.fixture(scope="module")
def dense(assets) -> VLMEngine:
    return VLMEngine(make_loaded(assets))


@pytest.fixture
def endless(dense):
    """The engine of a model that never ends by itself, and the list of its steps."""
    steps = []

    def never_end(_module, _args, logits):
        steps.append(1)
        logits[..., dense.processor.tokenizer.eos_token_id] = -torch.inf

    handle = dense.model.lm_head.register_forward_hook(never_end)
    yield dense, steps
    handle.remove()


def text_of(engine: VLMEngine, ids: list[int]) -> str:
    text = engine.processor.tokenizer.decode(ids, skip_special_tokens=True)
    return text.removesuffix("\ufffd")


def library_ids(engine: VLMEngine, sample: tuple, **settings) -> list[int]:
    """By `model.generate` of transformers, greedy."""
    batch = engine.processor.prompt_batch([sample])
    output = engine.model.generate(
        **batch, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, **settings
    )
    return output[0, batch["input_ids"].shape[1] :].tolist()


def test_generate_is_the_hand_written_loop(engine):
    samples = conversations()
    expected = [naive_greedy_ids(engine, sample) for sample in samples]
    answers = engine.generate(samples, GREEDY)
    assert [a.text for a in answers] == [text_of(engine, ids) for ids in expected]
    assert [a.num_new_tokens for a in answers] == [len(ids) for ids in expected]
    for answer, ids, sample in zip(answers, expected, samples, strict=True):
        assert answer.finish_reason == ("stop" if ids[-1] == 2 else "length")
        prompt = engine.processor.prompt_batch([sample])["input_ids"]
        assert answer.num_prompt_tokens == prompt.shape[1]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_row_does_not_depend_on_its_neighbours(engine, sampling):
    samples = conversations()
    together = engine.generate(samples, sampling)
    assert together == [engine.generate([sample], sampling)[0] for sample in samples]
    assert together[::-1] == engine.generate(samples[::-1], sampling)


def test_rows_that_end_early_leave_the_others_as_they_were(assets):
    engine, samples = VLMEngine(make_loaded(assets)), conversations()
    alone = [library_ids(engine, sample) for sample in samples]
    end = next(t for t in alone[1] if t not in alone[0] and t not in alone[2])
    engine.processor.tokenizer.eos_token_id = end
    answers = engine.generate(samples, GREEDY)
    assert answers[1].finish_reason == "stop"
    assert answers[1].num_new_tokens == alone[1].index(end) + 1
    for i in (0, 2):
        assert answers[i].text == text_of(engine, alone[i])
        assert answers[i].num_new_tokens == NEW_TOKENS


@pytest.mark.parametrize("penalty", [1.3, 2.5])
def test_repetition_penalty_is_that_of_transformers(engine, penalty):
    sampling = Sampling(NEW_TOKENS, temperature=0, repetition_penalty=penalty)
    plain = [a.text for a in engine.generate(conversations(), GREEDY)]
    answers = [a.text for a in engine.generate(conversations(), sampling)]
    expected = [library_ids(engine, s, repetition_penalty=penalty) for s in conversations()]
    assert answers == [text_of(engine, ids) for ids in expected] != plain


def test_sampling_that_leaves_one_token_is_greedy(engine):
    expected = [a.text for a in engine.generate(conversations(), GREEDY)]
    for only in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-40}):
        sampling = Sampling(NEW_TOKENS, **({"temperature": 5.0, "top_p": 1.0} | only))
        assert [a.text for a in engine.generate(conversations(), sampling)] == expected


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}],
    ids=lambda fields: next(iter(fields), "plain"),
)
def test_first_tokens_are_drawn_from_the_right_distribution(dense, fields):
    """2,000 seeds of one batch against the probabilities that the logits give."""
    num_draws, sample = 2000, conversations()[1]
    batch = dense.processor.prompt_batch([sample])
    with torch.no_grad():
        logits = dense.model(**batch).logits[0, -1]
    settings = {"temperature": 1.0, "top_p": 1.0} | fields
    expected = (logits / settings["temperature"]).softmax(-1)
    order = expected.argsort(descending=True)
    if "top_k" in fields:
        expected[order[3:]] = 0
    if "top_p" in fields:  # the fewest tokens that hold this share
        expected[order[1:][expected[order].cumsum(0)[:-1] >= 0.6]] = 0
    if "min_p" in fields:
        expected[expected < 0.3 * expected.max()] = 0
    expected /= expected.sum()
    sampler = Sampler(
        Sampling(1, **settings),
        [batch["input_ids"][0]] * num_draws,
        seeds=range(num_draws),
        end_ids={2},
        vocab_size=len(logits),
        device=logits.device,
    )
    drawn = sampler.choose(logits.expand(num_draws, -1))
    share = torch.bincount(drawn, minlength=len(expected)) / num_draws
    assert (share[expected == 0] == 0).all()
    error = (expected * (1 - expected) / num_draws).sqrt()
    assert ((share - expected).abs() <= 5 * error + 2 / num_draws).all()


def test_generate_is_seeded_and_leaves_the_global_random_numbers_alone(engine):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (
        engine.generate(conversations(), Sampling(NEW_TOKENS, 1.0, 1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    unseeded = [engine.generate(conversations(), Sampling(NEW_TOKENS, 1.0, 1.0)) for _ in "ab"]
    assert unseeded[0] != unseeded[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sample", range(3))
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_stream_gives_the_answer_of_generate(engine, sample, sampling):
    messages, images = conversations()[sample]
    stream = engine.stream(messages, images, sampling)
    pieces = list(stream)
    assert len(pieces) > 1 and all(pieces)
    assert stream.answer == engine.generate([(messages, images)], sampling)[0]
    assert "".join(pieces) == stream.answer.text


def test_stream_runs_the_tower_once(dense):
    calls = []
    handle = dense.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert len(list(dense.stream(*conversations()[2], GREEDY))) > 1
    finally:
        handle.remove()
    assert len(calls) == 1


def test_stream_stops_at_the_next_token(endless):
    engine, steps = endless
    messages, images = conversations()[1]
    sampling = Sampling(3000, temperature=0)
    for stop in ("close", "with", "cancel"):
        steps.clear()
        cancel = threading.Event()
        stream = engine.stream(messages, images, sampling, cancel=cancel)
        with pytest.raises(ValueError, match="not ended yet"):
            _ = stream.answer
        if stop == "with":
            with stream:
                first = next(stream)
        else:
            first = next(stream)
            stream.close() if stop == "close" else cancel.set()
        num_steps = len(steps)
        assert list(stream) == [] and len(steps) == num_steps
        answer = stream.answer
        assert (answer.text, answer.finish_reason) == (first, "cancelled")
        assert answer.num_new_tokens == num_steps


def test_generate_can_be_cancelled_from_another_thread(endless):
    engine, steps = endless
    cancel = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            engine.generate, conversations(), Sampling(20_000, temperature=0), cancel=cancel
        )
        while len(steps) < 5:
            assert not future.done()
        cancel.set()
        answers = future.result(timeout=60)
    assert {a.finish_reason for a in answers} == {"cancelled"}
    assert all(5 <= a.num_new_tokens < 20_000 for a in answers)


@pytest.mark.slow
def test_many_threads_get_the_answers_of_one(engine):
    """Streams and batches at once, sampled and greedy, with pictures opened meanwhile."""
    samples = conversations()
    jobs = [
        (s, Sampling(NEW_TOKENS, t, seed=seed))
        for s in samples
        for t in (0, 1.0)
        for seed in range(4)
    ]
    expected = [engine.generate([sample], sampling)[0] for sample, sampling in jobs]
    start = threading.Barrier(len(jobs))

    def work(job: tuple[int, tuple]):
        number, (sample, sampling) = job
        start.wait(timeout=60)
        if number % 2:
            return engine.generate([sample], sampling)[0]
        stream = engine.stream(*sample, sampling)
        for _ in stream:
            pass
        return stream.answer

    with ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(2):
            assert list(pool.map(work, enumerate(jobs))) == expected


def test_error_reaches_the_caller_and_the_engine_goes_on(dense, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("broken on purpose")

    messages, images = conversations()[1]
    with monkeypatch.context() as patch:
        patch.setattr(dense.model, "encode_images", fail)
        with pytest.raises(RuntimeError, match="broken on purpose"):
            list(dense.stream(messages, images, GREEDY))
    assert list(dense.stream(messages, images, GREEDY))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens must be at least 1; got 0"),
        ({"temperature": -0.1}, "--temperature must be at least 0"),
        ({"temperature": float("nan")}, "--temperature must"),
        ({"temperature": float("inf")}, "--temperature must"),
        ({"top_p": 0.0}, "--top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.01}, "--top_p must"),
        ({"top_k": -1}, "--top_k must be 0"),
        ({"repetition_penalty": 0}, "--repetition_penalty must be 0.1 to 10"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"seed": 2**63}, "--seed must be from 0"),
    ],
)
def test_sampling_refuses_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_no_conversation_is_an_error(dense):
    with pytest.raises(ValueError, match="no conversation"):
        dense.generate([], GREEDY)


def dialogue(*turns: tuple[str, str], last: str, system: str | None = None) -> list[dict]:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += ask(question, num_images=0)
        messages.append({"role": "assistant", "content": answer})
    return messages + ask(last, num_images=0)


def num_tokens(engine: VLMEngine, messages: list[dict]) -> int:
    text = engine.processor.render(messages, add_generation_prompt=True)
    return len(engine.processor.tokenizer(text)["input_ids"])


def test_fit_drops_the_oldest_text_turns_and_no_image(assets):
    turns = [
        ("What is a circle?", "A red circle."),
        ("<image>\nWhat?", "A picture."),
        ("What is red?", "A circle."),
        ("And <image>?", "Blue."),
    ]
    full = dialogue(*turns, last="图像里有什么？", system="You are a helpful assistant")
    images = [picture(6), picture(9)]
    size = num_tokens(VLMEngine(make_loaded(assets)), full)
    expected = {  # how much too long -> which turns stay
        0: turns,
        1: turns[1:],
        num_tokens(VLMEngine(make_loaded(assets)), dialogue(turns[0], last="a"))
        - num_tokens(VLMEngine(make_loaded(assets)), dialogue(last="a")): turns[1:],
        40: [turns[1], turns[3]],
    }
    for excess, kept in expected.items():
        engine = VLMEngine(make_loaded(assets, max_position_embeddings=size + 8 - excess))
        messages, num_dropped = engine.context.fit(full, max_new_tokens=8)
        assert messages == dialogue(*kept, last="图像里有什么？", system=full[0]["content"]), excess
        assert num_dropped == len(turns) - len(kept)
        (answer,) = engine.generate([(full, images)], Sampling(8, temperature=0))
        (same,) = engine.generate([(messages, images)], Sampling(8, temperature=0))
        assert answer.num_dropped_turns == num_dropped and answer.text == same.text
    assert full[0]["role"] == "system" and len(full) == 10  # the caller's list is as it was


def test_fit_keeps_a_quarter_of_the_context_for_the_answer_however_long_it_may_be(assets):
    turns = [("What is a circle?", "A red circle."), ("What is red?", "A circle.")]
    full = dialogue(*turns, last="And now?")
    size = num_tokens(VLMEngine(make_loaded(assets)), full)
    for context, num_dropped in ((2 * size, 0), (size + 2, 1)):
        engine = VLMEngine(make_loaded(assets, max_position_embeddings=context))
        (answer,) = engine.generate([(full, [])], Sampling(context, temperature=0))
        assert answer.num_dropped_turns == num_dropped
        kept = dialogue(*turns[num_dropped:], last="And now?")
        assert answer.num_prompt_tokens == num_tokens(engine, kept)
        assert 1 <= answer.num_new_tokens <= context - answer.num_prompt_tokens


def test_answer_gets_the_room_there_is_and_never_less_than_a_token(assets):
    sample = conversations()[1]
    size = VLMEngine(make_loaded(assets)).generate([sample], Sampling(1))[0].num_prompt_tokens
    for room in (5, 1):
        engine = VLMEngine(make_loaded(assets, max_position_embeddings=size + room))
        (answer,) = engine.generate([sample], Sampling(1000, temperature=0))
        expected = naive_greedy_ids(engine, sample)[:room]
        assert answer.text == text_of(engine, expected) and answer.num_new_tokens <= room
        assert answer.finish_reason == "length" or expected[-1] == 2
    full = VLMEngine(make_loaded(assets, max_position_embeddings=size))
    with pytest.raises(ValueError, match=f"the prompt has {size} tokens, the model takes {size}"):
        full.generate([sample], GREEDY)
    with pytest.raises(ValueError, match="without its earlier text turns"):
        messages = dialogue(("What?", "A circle."), last="circle " * size)
        full.context.fit(messages, max_new_tokens=GREEDY.max_new_tokens)


def test_text_pieces_never_hold_half_a_character(assets):
    """Every character of the text is several byte tokens; the pieces are whole ones."""
    tokenizer = load_tokenizer(assets / "tokenizer")
    text = "龘 naïve 🎈🏳️‍🌈 中文，完！ end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    pieces = TextPieces(tokenizer)
    said = [pieces.push(token) for token in ids]
    assert "".join(said) == text and "" in said and not any("\ufffd" in p for p in said)
    for cut in range(len(ids)):  # an answer cut anywhere ends with its last whole character
        pieces = TextPieces(tokenizer)
        part = "".join(pieces.push(token) for token in ids[:cut])
        assert text.startswith(part) and "\ufffd" not in part


def test_text_pieces_of_random_tokens_are_their_decoding(assets):
    tokenizer = load_tokenizer(assets / "tokenizer")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(0, len(tokenizer), (40,), generator=generator).tolist()
        pieces = TextPieces(tokenizer)
        said = "".join(pieces.push(token) for token in ids)
        assert said == tokenizer.decode(ids, skip_special_tokens=True).removesuffix("\ufffd")


def test_history_takes_whatever_the_model_said(dense):
    """Tags, special tokens and placeholders in an answer are words in the next prompt."""
    said = "see <image>, <|im_end|> and " + "@" * 50 + " " + TOKENIZER_TEXT[3]
    messages, images = conversations()[1]
    history = dense.remember(messages, said) + ask("And now?", num_images=0)
    (answer,) = dense.generate([(history, images)], GREEDY)
    assert answer.num_new_tokens > 0 and TOKENIZER_TEXT[3] in history[1]["content"]
    assert dense.remember(messages, "A circle @ home.")[1]["content"] == "A circle @ home."
    assert len(messages) == 1


def test_ask_puts_missing_tags_in_front():
    assert ask("What?", num_images=2)[0]["content"] == "<image>\n<image>\nWhat?"
    assert ask("What? <image>", num_images=1) == [{"role": "user", "content": "What? <image>"}]
