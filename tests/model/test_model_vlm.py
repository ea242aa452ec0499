"""If this fails, the vision-language model gives a sample other results in a batch than alone,
trains the wrong parts, or does not load what it saved.
"""

import pytest
import torch
from support.tiny_parts import TINY_MODEL, make_tower
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from model.model_vlm import MiniMindVLM, VLMConfig
from model.vision_tower import count_image_tokens, find_vision_dir, read_tower_shape

torch.set_num_threads(1)  # at these sizes more threads only wait for each other
AT, TEXT, SIDE = 34, 7, 32
NUM_TOKENS = 16  # of an image, in the tiny tower
TOWER_WIDTH = 24
TOLERANCE = 1e-5  # float32, logits of the order of 1
KINDS = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


def make_config(**fields) -> VLMConfig:
    fields = (
        TINY_MODEL
        | {
            "vocab_size": 120,
            "initializer_range": 0.3,  # wide enough that attention and images matter
            "vision_hidden_size": TOWER_WIDTH,
            "image_special_token": "@" * NUM_TOKENS,
            "image_ids": [AT] * NUM_TOKENS,
        }
        | fields
    )
    return VLMConfig(**fields)


def make_vlm(assets, **fields) -> MiniMindVLM:
    torch.manual_seed(0)
    return MiniMindVLM(make_config(**fields), vision_model_path=assets / "tower").eval()


def make_ids(*pieces: int | str) -> torch.Tensor:
    """One row: "image" is a placeholder, a number that many text tokens (all different)."""
    ids: list[int] = []
    for piece in pieces:
        ids += (
            [AT] * NUM_TOKENS if piece == "image" else range(40 + len(ids), 40 + len(ids) + piece)
        )
    return torch.tensor([ids])


def make_pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(row.shape[1] for row in rows)
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([pad(torch.ones_like(r), (width - r.shape[1], 0)) for r in rows])
    return ids, mask


@pytest.mark.parametrize(
    "hidden_size, num_layers, expected", [(512, 8, 26_223_616), (768, 16, 104_621_568)]
)
def test_model_size_is_the_contract(hidden_size, num_layers, expected):
    with torch.device("meta"):
        model = MiniMindVLM(VLMConfig(hidden_size=hidden_size, num_hidden_layers=num_layers))
        logits = model(torch.zeros(1, 3, dtype=torch.int64)).logits
    assert sum(p.numel() for p in model.parameters()) == expected
    assert logits.is_meta and logits.shape == (1, 3, 6400)
    assert {n for n in model.state_dict() if n.startswith("vision")} == {
        "vision_proj.vision_proj.0.weight",
        "vision_proj.vision_proj.0.bias",
    }


def test_model_meta_forward_with_images(assets):
    model = make_vlm(assets).to("meta")
    ids = make_ids(2, "image", 2).to("meta")
    assert model(ids, pixel_values=make_pixels(1).to("meta")).logits.shape == (1, 20, 120)


@KINDS
@torch.no_grad()
def test_forward_ragged_batch_equals_each_sample_alone(assets, use_moe):
    model = make_vlm(assets, use_moe=use_moe)
    rows = [make_ids(2, "image", 3), make_ids(5), make_ids("image", "image", 4, "image", 1)]
    counts, pixels = [1, 0, 3], make_pixels(4)
    ids, mask = left_padded(rows)
    together = model(ids, attention_mask=mask, pixel_values=pixels).logits
    for row, images, logits in zip(rows, pixels.split(counts), together, strict=True):
        alone = model(row, pixel_values=images if len(images) else None).logits[0]
        torch.testing.assert_close(logits[-row.shape[1] :], alone, atol=TOLERANCE, rtol=0)
    swapped = model(ids, attention_mask=mask, pixel_values=pixels.flip(0)).logits
    assert (swapped - together)[[0, 2], -1].abs().amax(-1).min() > 1e-2  # pictures matter


@torch.no_grad()
def test_forward_embeds_the_projected_features_at_the_placeholder(assets):
    model, pixels = make_vlm(assets), make_pixels(1)
    ids = make_ids(2, "image", 3)
    embeds = model.model.embed_tokens(ids)
    tower = model.vision_encoder(pixels).last_hidden_state[:, 1:]
    linear = model.vision_proj.vision_proj[0]
    embeds[0, 2 : 2 + NUM_TOKENS] = (tower @ linear.weight.T + linear.bias)[0]
    expected = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(
        model(ids, pixel_values=pixels).logits, expected, atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("keep_cls", [False, True])
def test_features_are_the_states_before_the_post_layernorm(assets, keep_cls):
    model, seen = make_vlm(assets), []
    tower, pixels = model.vision_encoder, make_pixels(2)
    norm = next(m for n, m in tower.named_modules() if n.endswith("post_layernorm"))
    handle = norm.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    features = model.get_image_embeddings(pixels, tower, keep_cls=keep_cls)
    handle.remove()
    assert features.shape == (2, NUM_TOKENS + keep_cls, TOWER_WIDTH) and not features.requires_grad
    cls_before, _ = seen[0]  # CLIP applies that norm to the CLS token alone
    if keep_cls:
        torch.testing.assert_close(features[:, 0], cls_before.reshape(2, -1))
    else:
        whole = model.get_image_embeddings(pixels, tower, keep_cls=True)
        assert torch.equal(features, whole[:, 1:])


def test_forward_sends_all_images_through_the_tower_in_one_call(assets):
    model, shapes = make_vlm(assets), []
    model.vision_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(next(iter([*args, *kwargs.values()])).shape[0]),
        with_kwargs=True,
    )
    ids, mask = left_padded([make_ids("image", "image"), make_ids(3), make_ids(1, "image")])
    model(ids, attention_mask=mask, pixel_values=make_pixels(3))
    assert shapes == [3]


@torch.no_grad()
def test_forward_image_mask_is_the_same_as_finding_the_placeholders(assets):
    model, pixels = make_vlm(assets), make_pixels(1)
    ids = make_ids(2, "image", 2)
    logits = model(ids, pixel_values=pixels, image_mask=ids == AT).logits
    assert torch.equal(logits, model(ids, pixel_values=pixels).logits)


@pytest.mark.parametrize(
    "pieces, num_images", [(("image",), 0), (("image",), 2), ((3, "image", "image"), 1), ((20,), 1)]
)
@pytest.mark.parametrize("layout", ["flat", "per_sample"])
def test_forward_refuses_a_count_that_does_not_fit(assets, pieces, num_images, layout):
    pixels = make_pixels(num_images) if num_images else None
    if layout == "per_sample" and num_images:
        pixels = pixels[None]
    with pytest.raises(ValueError, match="image placeholder"):
        make_vlm(assets)(make_ids(*pieces), pixel_values=pixels)


def test_forward_names_the_sample_that_does_not_fit(assets):
    ids, mask = left_padded([make_ids("image"), make_ids("image", "image")])
    with pytest.raises(ValueError, match="sample 1 "):
        make_vlm(assets)(ids, attention_mask=mask, pixel_values=make_pixels(2)[:, None])


@pytest.mark.parametrize("shape", [(0, 3, SIDE, SIDE), (2, 0, 3, SIDE, SIDE)])
@torch.no_grad()
def test_forward_takes_an_empty_set_of_images(assets, shape):
    model, ids = make_vlm(assets), torch.cat([make_ids(20)] * 2)
    logits = model(ids, pixel_values=torch.zeros(shape)).logits
    assert torch.equal(logits, model(ids).logits)


@pytest.mark.parametrize("shape", [(3, SIDE, SIDE), (2, 1, 3, SIDE, SIDE), (1, 1, 2, 3, 32, 32)])
def test_forward_refuses_other_layouts(assets, shape):
    with pytest.raises(ValueError, match="pixel_values"):
        make_vlm(assets)(make_ids("image"), pixel_values=torch.zeros(shape))


def test_backward_reaches_the_projection_but_not_the_tower(assets):
    model = make_vlm(assets).train()
    assert not model.vision_encoder.training
    ids = make_ids(2, "image", 3)
    model(ids, pixel_values=make_pixels(1), labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.vision_proj.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.vision_encoder.parameters())


def test_backward_of_a_text_batch_gives_the_projection_zero_gradient(assets):
    model, plain = make_vlm(assets).train(), make_vlm(assets)
    ids = make_ids(6)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.vision_proj.parameters())
    assert torch.equal(output.logits, plain(ids).logits)


def test_backward_of_a_text_batch_with_only_the_projection_trained(assets):
    model = make_vlm(assets).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vision_proj"))
    ids = make_ids(6)
    model(ids, labels=ids).loss.backward()
    assert all((p.grad == 0).all() for p in model.vision_proj.parameters())


@KINDS
@torch.no_grad()
def test_save_pretrained_round_trip_leaves_the_tower_out(assets, tmp_path, use_moe):
    model = make_vlm(assets, use_moe=use_moe)
    model.save_pretrained(tmp_path)
    loaded, report = MiniMindVLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert loaded.vision_encoder is None and loaded.config.image_ids == [AT] * NUM_TOKENS
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with pytest.raises(ValueError, match="no vision tower"):
        loaded(make_ids("image"), pixel_values=make_pixels(1))
    loaded.load_vision_encoder(assets / "tower")
    inputs = {"input_ids": make_ids(2, "image", 2), "pixel_values": make_pixels(1)}
    assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_first_release_configuration(assets, tmp_path):
    """CLS kept and a placeholder of two different tokens, here 9 `<` and 8 `>`."""
    placeholder = [60] * 9 + [62] * 8
    fields = {"image_ids": placeholder, "image_special_token": "<" * 9 + ">" * 8}
    model = make_vlm(assets, keep_cls=True, **fields)
    ids = torch.tensor([[TEXT, *placeholder, *placeholder, TEXT]])
    pixels = make_pixels(2)
    logits = model(ids, pixel_values=pixels).logits
    swapped = model(ids, pixel_values=pixels.flip(0)).logits
    assert (logits - swapped)[0, -1].abs().max() > 1e-2
    make_tower(tmp_path / "b32", image_size=224, patch_size=32)
    assert count_image_tokens(read_tower_shape(tmp_path / "b32"), keep_cls=True) == 50


def test_vision_tower_of_a_full_clip_folder(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = CLIPTextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    tower, _ = MiniMindVLM.get_vision_model(tmp_path)
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    assert not any("text" in name for name in tower.state_dict())
    pixels = make_pixels(1)
    with torch.no_grad():
        expected = clip.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected)


def test_vision_tower_that_does_not_fit_is_refused(assets, tmp_path):
    with pytest.raises(ValueError, match="16 tokens per image but the placeholder has 4"):
        make_vlm(assets, image_ids=[AT] * 4)
    with pytest.raises(ValueError, match="24 wide"):
        make_vlm(assets, vision_hidden_size=32)
    with pytest.raises(FileNotFoundError, match="vision_model_path"):
        find_vision_dir(tmp_path / "nowhere")
