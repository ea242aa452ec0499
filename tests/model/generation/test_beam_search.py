"""If this fails, `--num_beams` finds other answers than transformers' own beam search, answers that
depend on who asks at the same time, or a search that nothing can stop.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.third_generation import make_assets3, make_it_say, make_loaded3
from support.tiny_vlm import conversations, make_loaded, never_end, picture
from transformers import GenerationConfig

from model.generation.beam_search import MIN_SHARED_TOKENS, BeamDecoder, shared_room
from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling, add_sampling_arguments, sampling_from
from model.machine.device import OutOfMemory
from model.options import OnceParser

NEW_TOKENS = 12
BEAMS = Sampling(NEW_TOKENS, temperature=0, num_beams=3)


@pytest.fixture(scope="module")
def assets3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets3")
    make_assets3(folder)
    return folder


@pytest.fixture(scope="module", params=["dense", "moe", "third", "third_moe"])
def engine(request, assets, assets3) -> VLMEngine:
    use_moe = request.param.endswith("moe")
    if request.param.startswith("third"):
        return VLMEngine(make_loaded3(assets3, use_moe=use_moe))
    return VLMEngine(make_loaded(assets, use_moe=use_moe))


@pytest.fixture(scope="module")
def third(assets3) -> VLMEngine:
    return VLMEngine(make_loaded3(assets3))


@pytest.fixture
def endless(assets):
    """The engine of a model that never ends by itself, and the list of its steps."""
    engine, steps = VLMEngine(make_loaded(assets)), []
    never_end(engine.model)
    engine.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    return engine, steps


def samples() -> list[tuple]:
    """With 0, 1 and 2 pictures, and one that is as long as none of them."""
    more = (
        ask("<image> <image>\n<image> Which are red?", num_images=3),
        [*map(picture, (3, 5, 7))],
    )
    return [*conversations(), more]


def engine_ids(engine: VLMEngine, some: list[tuple], sampling: Sampling, **options) -> list:
    """New tokens of each answer, by the decoder that the engine uses."""
    batch, dropped = engine._prompts(some, sampling)
    decoder = engine._streams(batch, dropped, sampling, cancel=options.get("cancel"))._decoder
    assert isinstance(decoder, BeamDecoder)
    decoder.step()
    assert decoder.is_done
    return [answer.new_ids for answer in decoder.answers]


def library_ids(engine: VLMEngine, some: list[tuple], **settings) -> list[list[int]]:
    """By `generate` of transformers on the whole batch, images and all."""
    batch = engine.processor.prompt_batch(some)
    end = engine.processor.tokenizer.eos_token_id
    settings = {"max_new_tokens": NEW_TOKENS, "num_beams": 3, "do_sample": False} | settings
    output = engine.model.generate(**batch, pad_token_id=end, **settings)
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in rows]


def test_beams_are_those_of_transformers(engine):
    together = library_ids(engine, samples())
    assert engine_ids(engine, samples(), BEAMS) == together
    for sample, ids in zip(samples(), together, strict=True):
        assert library_ids(engine, [sample]) == [ids] == engine_ids(engine, [sample], BEAMS)
    greedy = library_ids(engine, samples(), num_beams=1)
    assert greedy != together and len({tuple(ids) for ids in together}) > 1


@pytest.mark.parametrize("length_penalty", [0.0, -3.0])
def test_length_penalty_is_that_of_transformers(third, length_penalty):
    settings = {"num_beams": 5, "length_penalty": length_penalty}
    found = engine_ids(third, samples(), Sampling(NEW_TOKENS, temperature=0, **settings))
    assert found == library_ids(third, samples(), **settings)
    plain = library_ids(third, samples(), num_beams=5)
    assert length_penalty == 0 or found != plain


def test_repetition_penalty_counts_no_padding(third):
    """transformers would count the padding of a batch as a token that the prompt holds."""
    sampling = replace(BEAMS, repetition_penalty=1.3)
    together = engine_ids(third, samples(), sampling)
    for sample, ids in zip(samples(), together, strict=True):
        assert library_ids(third, [sample], repetition_penalty=1.3) == [ids]
    pad = third.processor.tokenizer.pad_token_id

    def want_padding(_module, _args, logits):
        logits[..., pad] = logits.max(-1).values + 0.1

    handle = third.model.lm_head.register_forward_hook(want_padding)
    try:
        together = engine_ids(third, samples()[:2], sampling)
        assert pad in together[0]  # the shorter prompt, which is padded
        assert together == [engine_ids(third, [s], sampling)[0] for s in samples()[:2]]
    finally:
        handle.remove()


def test_answer_and_stream_are_the_best_beam(third):
    ids = library_ids(third, samples())
    answers = third.generate(samples(), BEAMS)
    end = third.processor.tokenizer.eos_token_id
    for sample, answer, expected in zip(samples(), answers, ids, strict=True):
        text = third.processor.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.text == text.removesuffix("\ufffd")
        assert answer.num_new_tokens == len(expected)
        assert answer.finish_reason == ("stop" if expected[-1] == end else "length")
        stream = third.stream(*sample, BEAMS)
        pieces = list(stream)
        assert stream.answer == answer and pieces == [answer.text] * bool(answer.text)


def test_tower_and_prompts_run_once(third):
    seen = []
    handles = [
        third.model.vision_encoder.register_forward_hook(lambda *_: seen.append("tower")),
        third.model.model.register_forward_hook(lambda _, args, out: seen.append(out[0].shape[:2])),
    ]
    try:
        engine_ids(third, samples()[:2], replace(BEAMS, max_new_tokens=3))
    finally:
        for handle in handles:
            handle.remove()
    width = third.processor.prompt_batch(samples()[:2])["input_ids"].shape[1]
    assert seen == ["tower", (2, width - 1), *[(6, 1)] * 3]


def test_thinking_is_split_from_a_beams_answer(assets3):
    loaded = make_loaded3(assets3)
    said = make_it_say(loaded, "It is\nred.\n", "</think>", "\n\nRed.")
    engine, messages = VLMEngine(loaded), ask("What?", num_images=0)
    sampling = replace(BEAMS, max_new_tokens=len(said) + 9, open_thinking=True)
    stream, pieces = engine.stream(messages, [], sampling), []
    for piece in stream:
        pieces.append((piece, stream.is_thinking))
    assert pieces == [("It is\nred.", True), ("Red.", False)]
    answer = stream.answer
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("It is\nred.", "Red.", "stop")
    assert answer.num_new_tokens == len(said)


def test_each_answer_ends_where_its_own_context_does(assets):
    engine = VLMEngine(make_loaded(assets))
    lengths = [engine.processor.prompt_batch([s])["input_ids"].shape[1] for s in samples()]
    context = max(lengths) + 2
    engine = VLMEngine(make_loaded(assets, max_position_embeddings=context))
    never_end(engine.model)
    limits = [min(NEW_TOKENS, context - length) for length in lengths]
    assert len(set(limits)) > 1
    sampling = replace(BEAMS, num_beams=5)
    found = engine_ids(engine, samples(), sampling)
    assert [len(ids) for ids in found] == limits
    for sample, ids, limit in zip(samples(), found, limits, strict=True):
        assert library_ids(engine, [sample], num_beams=5, max_new_tokens=limit) == [ids]
    assert {answer.finish_reason for answer in engine.generate(samples(), sampling)} == {"length"}


def test_search_can_be_cancelled_at_any_step(endless):
    engine, steps = endless
    cancel = threading.Event()
    handle = engine.model.lm_head.register_forward_hook(
        lambda *_: cancel.set() if len(steps) == 4 else None
    )
    sampling = replace(BEAMS, max_new_tokens=20_000)
    expected = engine_ids(engine, samples(), replace(BEAMS, max_new_tokens=3))
    for answer_all in (True, False):
        steps.clear()
        cancel.clear()
        if answer_all:
            answers = engine.generate(samples(), sampling, cancel=cancel)
        else:
            stream = engine.stream(*samples()[0], sampling, cancel=cancel)
            pieces, answers = list(stream), [stream.answer]
            assert pieces == [answers[0].text]
        assert len(steps) == 4  # one of the prompts, three of the search
        for answer, ids in zip(answers, expected, strict=False):
            text = engine.processor.tokenizer.decode(ids, skip_special_tokens=True)
            assert answer.text == text.removesuffix("\ufffd")
            assert (answer.finish_reason, answer.num_new_tokens) == ("cancelled", 3)
    handle.remove()


def test_search_that_was_cancelled_before_computes_nothing(endless):
    engine, steps = endless
    cancel = threading.Event()
    cancel.set()
    (answer,) = engine.generate(samples()[:1], BEAMS, cancel=cancel)
    stream = engine.stream(*samples()[0], BEAMS, cancel=cancel)
    assert list(stream) == [] and stream.answer == answer and not steps
    assert (answer.text, answer.finish_reason, answer.num_new_tokens) == ("", "cancelled", 0)


def test_threads_get_the_answers_of_one(third):
    jobs = [(s, replace(BEAMS, num_beams=n)) for s in samples()[:3] for n in (1, 3)]
    expected = [third.generate([sample], sampling) for sample, sampling in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(lambda job: third.generate([job[0]], job[1]), jobs)) == expected


def test_sampling_of_a_folder_does_not_mix_in(assets):
    engine = VLMEngine(make_loaded(assets))
    expected = engine.generate(samples(), BEAMS)
    own = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "min_new_tokens": 20, "top_k": 2}
    engine.model.generation_config = GenerationConfig(do_sample=True, **own)
    assert engine.generate(samples(), BEAMS) == expected
    assert engine.model.generation_config.repetition_penalty == 3.0


def test_generated_placeholder_is_no_image(assets):
    """With one token an image, any generated one of its kind would look like an image."""
    loaded = make_loaded(assets)
    image = loaded.model.config.image_ids[0]

    def want_image(_module, _args, logits):
        logits[..., image] = 100.0

    loaded.model.lm_head.register_forward_hook(want_image)
    loaded.model.config.image_ids, loaded.model.config.image_token_len = [image], 1
    messages = ask("What?", num_images=0)
    (ids,) = engine_ids(VLMEngine(loaded), [(messages, [])], BEAMS)
    assert set(ids) == {image}


def test_memory_that_runs_out_is_one_line_and_the_engine_goes_on(assets, monkeypatch):
    engine = VLMEngine(make_loaded(assets))
    expected = engine.generate(samples(), BEAMS)

    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.lm_head, "forward", fail)
        stream = engine.stream(*samples()[0], BEAMS)
        for broken in (lambda: engine.generate(samples(), BEAMS), lambda: list(stream)):
            with pytest.raises(OutOfMemory, match=r"^out of memory \(.*\); ask more briefly"):
                broken()
        assert stream.answer.finish_reason == "cancelled"
    assert engine.generate(samples(), BEAMS) == expected


def test_beams_together_hold_no_more_than_a_context(assets):
    room = partial(shared_room, name="num_beams")
    assert room(100, 1, max_tokens=32_768) == 32_668
    assert room(100, 16, max_tokens=32_768) == 32_768 // 16 - 100
    assert room(100, 2, max_tokens=400) == 300
    assert room(100, 16, max_tokens=2000) == MIN_SHARED_TOKENS // 16 - 100
    told = "16 beams with a prompt of 1,024 tokens.* lower num_beams"
    with pytest.raises(ValueError, match=told):
        room(1024, 16, max_tokens=8192)
    engine = VLMEngine(make_loaded(assets, max_position_embeddings=32_768))
    question = ask("a b " * 1500, num_images=0)
    with pytest.raises(ValueError, match="lower num_beams"):
        engine.stream(question, [], replace(BEAMS, num_beams=16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 0}, r"--num_beams must be 1 \(no beam search\) to 16; got 0"),
        ({"num_beams": 17}, "--num_beams must"),
        ({"length_penalty": float("nan")}, "--length_penalty must be from -10 to 10; got nan"),
        ({"num_beams": 2, "temperature": 0.1}, "--num_beams 2 .* needs --temperature 0; got 0.1"),
    ],
)
def test_sampling_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"temperature": 0} | fields)


@pytest.mark.parametrize("generation", [None, 2, 3])
def test_flags_of_beams_are_greedy_unless_they_say_otherwise(generation):
    def sampling(*words: str) -> Sampling:
        parser = OnceParser()
        add_sampling_arguments(parser)
        return sampling_from(parser.parse_args(words), generation)

    assert sampling().num_beams == 1 and sampling().temperature > 0
    found = sampling("--num_beams", "4", "--length_penalty", "0")
    assert found.decoding == {"temperature": 0, "num_beams": 4, "length_penalty": 0}
    with pytest.raises(ValueError, match="--num_beams 4 .* needs --temperature 0; got 0.5"):
        sampling("--num_beams", "4", "--temperature", "0.5")
