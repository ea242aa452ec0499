"""If this fails, tokens are drawn from another distribution than the settings say, a row depends on
its neighbours, or penalties and ends do not do what they promise.
"""

import pytest
import torch
from support.tiny_vlm import NEW_TOKENS, conversations, make_loaded, never_end
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.generation.engine import VLMEngine, ask
from model.generation.sampler import FIRST_CANDIDATES, Sampler, candidates, draw
from model.generation.sampling import Sampling

V = 3 * FIRST_CANDIDATES
PLAIN = Sampling(NEW_TOKENS, temperature=0)


def logits(*, rows: int = 4, width: float = 3.0, size: int = V) -> torch.Tensor:
    return width * torch.randn(rows, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def engine(assets) -> VLMEngine:
    return VLMEngine(make_loaded(assets))


@pytest.fixture(scope="module")
def endless(assets) -> VLMEngine:
    loaded = make_loaded(assets)
    never_end(loaded.model)
    return VLMEngine(loaded)


@pytest.mark.parametrize("width", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 5, "top_p": 1.0},
        {"top_k": 0, "top_p": 0.9},
        {"top_k": 40, "top_p": 0.5, "temperature": 0.7},
        {"top_p": 1.0, "min_p": 0.05},
        {"top_p": 0.8, "top_k": 300, "min_p": 0.2, "temperature": 1.5},
    ],
    ids=str,
)
def test_candidates_are_those_of_transformers(fields, width):
    sampling, scores = Sampling(**{"temperature": 1.0} | fields), logits(width=width)
    warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    expected = scores
    for warp in warpers:
        expected = warp(None, expected)
    shares, ids = candidates((scores / sampling.temperature).softmax(-1), sampling)
    found = torch.zeros_like(scores).scatter(1, ids, shares)
    found = found / found.sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected.softmax(-1), atol=1e-6, rtol=1e-5)


def test_draw_inverts_the_distribution_and_never_leaves_it():
    scores = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    shares = scores.softmax(-1)[0]
    for top_p, order in ((1.0, [0, 1, 3]), (0.999999, [3, 1, 0])):  # one sorts, one does not
        sampling, bound = Sampling(temperature=1.0, top_p=top_p), 0.0
        for token in order:
            inside = torch.tensor([bound + 0.001, bound + float(shares[token]) - 0.001])
            assert draw(scores.expand(2, -1), sampling, inside).tolist() == [token] * 2
            bound += float(shares[token])
        ends = torch.tensor([0.0, 1 - 2**-24])
        assert draw(scores.expand(2, -1), sampling, ends).tolist() == [order[0], order[-1]]


def test_tiny_settings_draw_the_likeliest_token():
    """As float32 they are 0: a division by it would draw a token that does not exist."""
    scores = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    for fields in ({"temperature": 1e-50}, {"temperature": 1e-50, "top_p": 0.85}):
        assert Sampling(**fields).temperature == 0
    for number in (0.0, 0.999):
        sampling = Sampling(temperature=1.0, top_p=1e-50)
        assert draw(scores, sampling, torch.tensor([number])).tolist() == [2]


def test_row_takes_one_number_of_its_own_generator():
    """Alone, beside others, and after others have left: the same tokens."""
    sampling = Sampling(temperature=1.0, top_p=0.95)
    steps = [logits(rows=3) + i for i in range(6)]

    def sampler(seeds) -> Sampler:
        prompts = [torch.tensor([5])] * len(seeds)
        device = torch.device("cpu")
        return Sampler(sampling, prompts, seeds=seeds, end_ids={2}, vocab_size=V, device=device)

    alone = [
        [int(own.choose(s[i : i + 1])) for s in steps] for i in range(3) for own in [sampler([i])]
    ]
    together, found = sampler([0, 1, 2]), []
    for step in steps[:3]:
        found.append(together.choose(step).tolist())
    together.select([0, 2])
    for step in steps[3:]:
        found.append(together.choose(step[[0, 2]]).tolist())
    assert [row[0] for row in found] == alone[0] and [row[-1] for row in found] == alone[2]
    drawn = torch.Generator().manual_seed(0)
    uniform = torch.cat([torch.rand(1, generator=drawn) for _ in steps])
    expected = [int(draw(s[:1], sampling, u[None])) for s, u in zip(steps, uniform, strict=True)]
    assert alone[0] == expected


def tokens(engine: VLMEngine, **fields) -> list[int]:
    sample = conversations()[0]
    streams = engine.choices(*sample, Sampling(NEW_TOKENS, temperature=0, num_logprobs=0, **fields))
    for _ in streams:
        pass
    return [score.token_id for score in streams.scores(0, slice(None))]


def test_penalties_push_tokens_of_the_answer_away(endless):
    plain = tokens(endless)
    assert len(set(plain)) < NEW_TOKENS  # something is said twice
    for field in ("presence_penalty", "frequency_penalty"):
        assert tokens(endless, **{field: 0.0}) == plain
        assert len(set(tokens(endless, **{field: 2.0}))) >= len(set(plain))
    sampler = Sampler(
        Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=1.0),
        [torch.tensor([3])],  # what the prompt holds does not count
        seeds=[None],
        end_ids={2},
        vocab_size=4,
        device=torch.device("cpu"),
    )
    scores = torch.tensor([[0.0, 2.0, -1.0, 1.0]])
    assert [int(sampler.choose(scores)) for _ in range(4)] == [1, 3, 1, 0]


def test_min_tokens_ignore_eos_and_stop_ids_say_where_an_answer_ends(engine, endless):
    def answer(own: VLMEngine, **fields):
        return own.generate([conversations()[0]], Sampling(NEW_TOKENS, temperature=0, **fields))[0]

    said = tokens(endless)
    stop = said[5]
    first = said.index(stop)
    stopped = answer(endless, stop_token_ids=(stop,))
    assert (stopped.finish_reason, stopped.num_new_tokens) == ("stop", first + 1)
    tokenizer = endless.processor.tokenizer
    assert stopped.text == tokenizer.decode(said[:first], skip_special_tokens=True)
    later = answer(endless, stop_token_ids=(stop,), min_tokens=first + 3)
    assert later.num_new_tokens >= first + 3

    def end_at_once(_module, _args, logits):
        logits[..., engine.processor.tokenizer.eos_token_id] = 1e4

    hook = engine.model.lm_head.register_forward_hook(end_at_once)
    try:
        assert answer(engine).num_new_tokens == 1
        assert answer(engine, min_tokens=4).num_new_tokens == 5
        ignored = answer(engine, ignore_eos=True)
        assert (ignored.finish_reason, ignored.num_new_tokens) == ("length", NEW_TOKENS)
        assert ignored.text == ""
        marked = answer(engine, ignore_eos=True, skip_special_tokens=False)
        assert marked.text == engine.processor.tokenizer.eos_token * NEW_TOKENS
    finally:
        hook.remove()


def test_several_answers_are_those_of_their_seeds_and_one_prompt(engine):
    sample, sampling = conversations()[2], Sampling(NEW_TOKENS, temperature=1.0, seed=7)
    calls = []
    hook = engine.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    streams = engine.choices(*sample, sampling, num_choices=3)
    said = ["", "", ""]
    for written in streams:
        said[written.choice] += written.text
    hook.remove()
    alone = [
        engine.generate([sample], Sampling(NEW_TOKENS, temperature=1.0, seed=7 + i))[0]
        for i in range(3)
    ]
    assert streams.answers == alone and said == [answer.text for answer in alone]
    assert len(set(said)) > 1 and len(calls) == 1


def test_one_answer_may_end_and_the_others_go_on(endless):
    streams = endless.choices(ask("What?", num_images=0), [], PLAIN, num_choices=2)
    for written in streams:
        if written.choice == 1:
            streams.end(1)
    first, second = streams.answers
    assert (first.finish_reason, first.num_new_tokens) == ("length", NEW_TOKENS)
    assert second.finish_reason == "cancelled" and second.num_new_tokens < 5


def test_logprobs_are_the_models_own(engine):
    sample = conversations()[1]
    sampling = Sampling(4, temperature=0, repetition_penalty=1.5, num_logprobs=3)
    streams = engine.choices(*sample, sampling)
    for _ in streams:
        pass
    scores = streams.scores(0, slice(None))
    with torch.no_grad():
        batch = engine.processor.prompt_batch([sample])
        own = engine.model(**batch).logits[0, -1].log_softmax(-1)
    values, ids = own.topk(3)
    assert [i for i, _ in scores[0].likeliest] == ids.tolist()
    assert [v for _, v in scores[0].likeliest] == pytest.approx(values.tolist(), abs=1e-4)
    assert scores[0].logprob == pytest.approx(float(own[scores[0].token_id]), abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_p": 1.5}, "--min_p must be from 0 to 1; got 1.5"),
        ({"presence_penalty": 2.5}, "--presence_penalty must be from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "--frequency_penalty must"),
        ({"max_new_tokens": 4, "min_tokens": 5}, "--min_tokens must be from 0 to the longest"),
        ({"num_logprobs": 21}, "--num_logprobs must be from 0 to 20"),
        ({"num_beams": 2, "temperature": 0, "min_p": 0.1}, "--min_p does not go with --num_beams"),
        ({"num_beams": 2, "temperature": 0, "stop_token_ids": (5,)}, "--stop_token_ids does not"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_text_goes_on_from_a_prompt_as_it_stands(engine):
    """Ids or text, in one batch; special tokens of the text are read as such."""
    messages = ask("What is a circle?", num_images=0)
    prompt = engine.processor.render(messages, add_generation_prompt=True)
    ids = engine.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    (expected,) = engine.generate([(messages, [])], PLAIN)
    streams = engine.complete([prompt, ids, "a circle"], PLAIN)
    for _ in streams:
        pass
    first, second, other = streams.answers
    assert first.text == second.text == expected.text
    assert first.num_prompt_tokens == expected.num_prompt_tokens > other.num_prompt_tokens
    for prompt, message in (
        ("", "the prompt has 0 tokens"),
        ("\ud800", "half a character"),
        ([10**6], "the prompt's ids must be from 0 to"),
        ("a b " * 40_000, "1 to 32,767 are taken"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.complete([prompt], PLAIN)


def test_begun_answer_is_continued(engine):
    """Token for token what follows in the answer that the model itself began."""
    messages = ask("What is a circle?", num_images=0)
    (whole,) = engine.generate([(messages, [])], PLAIN)
    begun = whole.text[: len(whole.text) // 2]
    messages.append({"role": "assistant", "content": begun})
    prompt = engine.processor.render(messages, add_generation_prompt=True)
    assert prompt.endswith(f"<|im_start|>assistant\n{begun}")
    ids = engine.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    (answer,) = engine.generate([(messages, [])], PLAIN)
    streams = engine.complete([ids], PLAIN)
    for _ in streams:
        pass
    assert answer.text == streams.answers[0].text and answer.num_prompt_tokens == len(ids)
