"""If this fails, a chat's next turn computes all before it again, or an answer is made of another
text, picture or user than its own.
"""

import pytest
import torch
from support.tiny_vlm import NUM_TOKENS, make_loaded, never_end, picture

from model.generation import prefixes
from model.generation.engine import VLMEngine, ask
from model.generation.prefixes import Prefixes
from model.generation.sampling import Sampling

GREEDY = Sampling(12, temperature=0, num_logprobs=0)
RINGS, MORE = picture(6), picture(9)


@pytest.fixture(scope="module", params=[{}, {"generation": 3}], ids=["second", "third"])
def engine(request, assets) -> VLMEngine:
    loaded = make_loaded(assets, **request.param)
    never_end(loaded.model)
    return VLMEngine(loaded)


@pytest.fixture
def computed(engine, monkeypatch):
    """Tokens of the prompts that go through the model, and images through the tower."""
    monkeypatch.setattr(prefixes, "LEAST", 8)
    seen = {"tokens": 0, "images": 0}

    def count_tokens(_module, args, _output):
        seen["tokens"] += args[0].shape[1] if args[0].ndim == 2 else 0

    def count_images(_module, args, kwargs, _output):
        seen["images"] += len((*args, *kwargs.values())[0])

    model = engine.model
    hooks = [
        model.model.embed_tokens.register_forward_hook(count_tokens),
        model.vision_encoder.register_forward_hook(count_images, with_kwargs=True),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def answer(engine: VLMEngine, messages: list, images: list):
    streams = engine.choices(messages, images, GREEDY)
    for _ in streams:
        pass
    return streams.answers[0], streams.scores(0, slice(None))


def check_same(engine: VLMEngine, shared: VLMEngine, messages: list, images: list) -> str:
    (found, scores), (expected, others) = (answer(e, messages, images) for e in (shared, engine))
    assert found == expected
    for score, own in zip(scores, others, strict=True):
        assert score.logprob == pytest.approx(own.logprob, abs=1e-4)
    return found.text


def test_next_turn_of_a_chat_computes_what_is_new(engine, computed):
    shared, images = engine.batched(4), [RINGS, MORE]
    talk = ask("<image> or <image>?", num_images=2)
    said = [check_same(engine, shared, talk, images)]
    for question in ("And now?", "Which one?"):
        talk = engine.remember(talk, said[-1])
        before = engine.processor.prompt_batch([(talk, images)])["input_ids"].shape[1]
        talk = [*talk, {"role": "user", "content": question}]
        whole = engine.processor.prompt_batch([(talk, images)])["input_ids"].shape[1]
        computed |= {"tokens": 0, "images": 0}
        text = answer(shared, talk, images)[0].text
        assert computed["images"] == 0 and computed["tokens"] < whole - 2 * NUM_TOKENS <= before
        said.append(check_same(engine, shared, talk, images))
        assert text == said[-1]
    assert len(set(said)) == 3


def test_other_picture_is_another_beginning(engine, computed):
    """The same words and places: what was computed of one user's picture serves no other's."""
    shared, talk = engine.batched(4), ask("What is in it? <image> <image>", num_images=2)
    said = []
    for images in ([RINGS, RINGS], [RINGS, MORE], [MORE, RINGS], [MORE, MORE], [RINGS, RINGS]):
        computed |= {"tokens": 0, "images": 0}
        answer(shared, talk, images)
        said.append((check_same(engine, shared, talk, images), computed["images"]))
    assert len({text for text, _ in said}) == 4 and said[0][0] == said[-1][0]
    new = [number - 2 for _, number in said]  # beside those of the engine that has no batch
    assert new == [2, 1, 2, 1, 0]


def test_kept_is_what_was_used_last(monkeypatch):
    monkeypatch.setattr(prefixes, "LEAST", 4)
    monkeypatch.setattr(prefixes, "KEPT", 24)
    kept = Prefixes(num_image_tokens=4)
    texts = [torch.arange(10) + 100 * n for n in range(3)]
    no_images = torch.zeros(10, dtype=torch.bool)
    for text in texts[:2]:
        kept.keep(text, text.expand(1, 2, 1, 10)[..., None])
    found = kept.find(texts[0], no_images)
    assert found.length == 9 and found.states.flatten().tolist() == [*range(9)] * 2
    kept.keep(texts[2], texts[2].expand(1, 2, 1, 10)[..., None])
    assert [kept.find(text, no_images) is None for text in texts] == [False, True, False]
    other = texts[2].clone()
    other[7] = 5
    assert kept.find(other, no_images).length == 7
    in_an_image = torch.arange(10) >= 5  # 5 to 8 are one: it is not cut
    assert kept.find(other, in_an_image).length == 5
    other[3] = 5
    assert kept.find(other, no_images) is None
