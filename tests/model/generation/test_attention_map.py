"""If this fails, the picture of where an answer looks highlights patches that the model did not
attend to.
"""

import copy

import pytest
import torch
from support.tiny_vlm import NUM_TOKENS, conversations, make_loaded, picture
from transformers.models.llama import modeling_llama

from model.generation.engine import VLMEngine, ask

ANSWER = "A red circle"


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def engine(request, assets) -> VLMEngine:
    return VLMEngine(make_loaded(assets, use_moe=request.param))


def eager_attention(engine: VLMEngine, sample: tuple, monkeypatch) -> tuple[torch.Tensor, ...]:
    """Attention of every layer (L, H, T, T) as the model itself computes it, the image mask and
    where the answer begins."""
    model, seen = copy.deepcopy(engine.model), []
    model.config._attn_implementation = "eager"

    def spy(*args, **kwargs):
        mixed, weights = modeling_llama.eager_attention_forward(*args, **kwargs)
        seen.append(weights[0])
        return mixed, weights

    monkeypatch.setattr("model.attention.eager_attention_forward", spy)
    batch = engine.processor.prompt_batch([sample])
    answer = engine.processor.tokenizer(ANSWER)["input_ids"]
    ids = torch.cat([batch["input_ids"], torch.tensor([answer])], 1)
    with torch.no_grad():
        model(ids, pixel_values=batch["pixel_values"])
    return torch.stack(seen), batch["image_mask"][0], batch["input_ids"].shape[1]


def test_look_is_the_attention_of_the_model(engine, monkeypatch):
    sample = conversations()[2]
    weights, mask, start = eager_attention(engine, sample, monkeypatch)
    patches = weights[:, :, start:].mean((1, 2))[:, :start][:, mask]  # (L, I * P)
    expected = patches.view(len(weights), 2, 4, 4)
    for layer in (0, 1):
        maps = engine.look(*sample, ANSWER, layer=layer)
        torch.testing.assert_close(torch.stack(maps), expected[layer])
    maps = engine.look(*sample, ANSWER)
    torch.testing.assert_close(torch.stack(maps), expected.mean(0))
    assert all(0 < m.sum() < 1 and m.dtype == torch.float32 for m in maps)


def test_look_of_a_hand_made_head_finds_the_patch(assets):
    """Keys are the features themselves: the patch whose feature the answer's token has wins."""
    engine = VLMEngine(
        make_loaded(assets, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    )
    model = engine.model
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.copy_(torch.eye(32) * 10)
    messages, images = ask("<image>\nWhat?", num_images=1), [picture(6)]
    features = torch.zeros(1, NUM_TOKENS, 32)
    # The first frequencies turn with the position, the last of each half hardly do.
    features[..., 15], features[0, 6, 15], features[0, 6, 31] = 1.0, 0.0, 1.0
    token = engine.processor.tokenizer("A")["input_ids"]
    model.model.embed_tokens.weight[:] = 0
    model.model.embed_tokens.weight[:, 14] = 1.0
    model.model.embed_tokens.weight[token] = features[0, 6]
    model.encode_images = lambda _pixels: features
    (shown,) = engine.look(messages, images, "A")
    assert shown.shape == (4, 4) and shown.argmax() == 6 and shown[1, 2] > 0.4


def test_look_leaves_the_cls_token_out(assets):
    ids = [34] * (NUM_TOKENS + 1)
    engine = VLMEngine(
        make_loaded(assets, keep_cls=True, image_special_token="@" * len(ids), image_ids=ids)
    )
    maps = engine.look(*conversations()[2], ANSWER)
    assert [m.shape for m in maps] == [(4, 4), (4, 4)]


def test_look_refuses_what_it_cannot_show(engine):
    assert engine.look(*conversations()[0], ANSWER) == []
    with pytest.raises(ValueError, match="the answer is empty"):
        engine.look(*conversations()[1], "")
    with pytest.raises(ValueError, match="layer 2 is none of the model's 0 to 1"):
        engine.look(*conversations()[1], ANSWER, layer=2)
