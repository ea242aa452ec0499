"""If this fails, `model.generate` of transformers gives other tokens with a cache, a batch or beams
than without, or gives a sample another's images.
"""

import pytest
import torch
from support.tiny_vlm import NEW_TOKENS, conversations, make_loaded, naive_greedy_ids, picture

from model.model_minimind import MiniMindForCausalLM
from model.weights.build_model import LoadedModel


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def loaded(request, assets) -> LoadedModel:
    return make_loaded(assets, use_moe=request.param)


def greedy_ids(loaded: LoadedModel, samples: list, **kwargs) -> list[list[int]]:
    """New tokens of each sample by `model.generate`."""
    batch = loaded.processor.prompt_batch(samples)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0} | kwargs
    output = loaded.model.generate(**batch, **settings)
    return output[:, batch["input_ids"].shape[1] :].tolist()


def without_padding(ids: list[int]) -> list[int]:
    return ids[: ids.index(2) + 1] if 2 in ids else ids


def test_generate_cached_batched_and_uncached_are_the_same(loaded):
    samples = conversations()
    expected = [naive_greedy_ids(loaded, sample) for sample in samples]
    assert len({tuple(ids) for ids in expected}) == len(samples)
    for use_cache in (True, False):
        together = greedy_ids(loaded, samples, use_cache=use_cache)
        assert [without_padding(ids) for ids in together] == expected
        alone = [greedy_ids(loaded, [sample], use_cache=use_cache)[0] for sample in samples]
        assert alone == expected


def test_generate_depends_on_the_pictures(loaded):
    (_, one, two) = conversations()
    other = (one[0], [picture(9)]), (two[0], two[1][::-1])
    for sample, swapped in zip((one, two), other, strict=True):
        assert greedy_ids(loaded, [sample]) != greedy_ids(loaded, [swapped])


def test_generate_goes_on_when_a_row_has_ended(loaded):
    samples = conversations()
    end = greedy_ids(loaded, samples[:1])[0][3]
    together = greedy_ids(loaded, samples, eos_token_id=end)
    for sample, ids in zip(samples, together, strict=True):
        alone = greedy_ids(loaded, [sample], eos_token_id=end)[0]
        assert ids == alone + [0] * (len(ids) - len(alone))
    assert len(together[0]) > together[0].index(end) + 1  # another row was longer


def test_generate_runs_the_tower_once(loaded):
    calls = []
    handle = loaded.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert len(greedy_ids(loaded, conversations())[0]) > 1
    finally:
        handle.remove()
    assert len(calls) == 1


BEAMS = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}


@torch.no_grad()
def beams_of_one(loaded: LoadedModel, sample: tuple) -> list[list[int]]:
    """Beam search that never sees an image: the features stand in its embeddings already."""
    batch = loaded.processor.prompt_batch([sample])
    embeds = loaded.model.model.embed_tokens(batch["input_ids"])
    if len(batch["pixel_values"]):
        features = loaded.model.encode_images(batch["pixel_values"]).flatten(0, 1)
        embeds[batch["image_mask"]] = features
    llm = MiniMindForCausalLM(loaded.model.config).eval()
    llm.model, llm.lm_head = loaded.model.model, loaded.model.lm_head
    return llm.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], pad_token_id=0, **BEAMS
    ).tolist()


@pytest.mark.parametrize("with_mask", [True, False], ids=["image_mask", "ids_only"])
def test_generate_beams_keep_images_with_their_sample(loaded, with_mask):
    samples = conversations()[::-1]  # 2, 1, 0 pictures
    batch = loaded.processor.prompt_batch(samples)
    if not with_mask:
        del batch["image_mask"]
    output = loaded.model.generate(**batch, pad_token_id=0, **BEAMS)
    together = output[:, batch["input_ids"].shape[1] :].tolist()
    expected = [ids for sample in samples for ids in beams_of_one(loaded, sample)]
    width = len(together[0])
    assert together == [ids + [0] * (width - len(ids)) for ids in expected]


@pytest.mark.parametrize("with_mask", [True, False], ids=["image_mask", "ids_only"])
def test_generate_several_answers_keep_images_with_their_sample(loaded, with_mask):
    """Sampling that always takes the likeliest token: every answer is the greedy one."""
    samples = conversations()[::-1]
    batch = loaded.processor.prompt_batch(samples)
    if not with_mask:
        del batch["image_mask"]
    settings = {"max_new_tokens": 8, "do_sample": True, "top_k": 1, "pad_token_id": 0}
    output = loaded.model.generate(**batch, num_return_sequences=2, **settings)
    expected = [ids for sample in samples for ids in greedy_ids(loaded, [sample], max_new_tokens=8)]
    together = [without_padding(x) for x in output[:, batch["input_ids"].shape[1] :].tolist()]
    assert together == [without_padding(ids) for ids in expected for _ in range(2)]
