"""If this fails, a vision tower says other things of a picture than the library's own class does,
or a folder that does not fit is taken for one that does.
"""

import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from support.third_generation import make_tokenizer3
from support.tiny_parts import TINY_MODEL
from support.tiny_vlm import make_loaded
from support.towers import TOWERS, make_tower_of, randomise

from model.generation.attention_map import image_attention
from model.generations import GENERATIONS
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vision.preprocessing import measure
from model.vision.projection import merge_patches
from model.vision_tower import (
    TowerShape,
    count_image_tokens,
    find_vision_dir,
    load_vision_config,
    load_vision_tower,
    read_tower_shape,
)
from model.vlm_processor import load_tokenizer
from model.weights.build_model import placeholder_config
from model.weights.metadata import tower_sha256
from trainer.loop.engine import lighten_tower

torch.set_num_threads(1)
TOLERANCE = 1e-5  # float32, features of the order of 1: convolutions depend on the alignment
MAPS = ("resnet", "convnext", "convnextv2", "efficientnet")
KINDS = pytest.mark.parametrize("kind", TOWERS)


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict:
    """Kind -> folder, the library's own model, and pixels of its size."""
    made = {}
    for kind in TOWERS:
        folder = tmp_path_factory.mktemp(kind)
        model = make_tower_of(kind, folder)
        side = 128 if kind == "efficientnet" else 32
        pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
        made[kind] = folder, model, pixels
    return made


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def features(tower, pixels, **options) -> torch.Tensor:
    return MiniMindVLM.get_image_embeddings(pixels, tower, **options)


def as_tokens(states: torch.Tensor) -> torch.Tensor:
    """Plainly: row by row, what stands at each place of a map."""
    if states.ndim == 3:
        return states
    _, _, height, width = states.shape
    return torch.stack([states[:, :, y, x] for y in range(height) for x in range(width)], 1)


@KINDS
@torch.no_grad()
def test_tower_gives_what_the_librarys_class_gives(towers, kind):
    folder, own, pixels = towers[kind]
    _, _, num_prefix, grid, width = TOWERS[kind]
    tower, processor = MiniMindVLM.get_vision_model(folder)
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    shape = read_tower_shape(folder)
    expected_shape = (pixels.shape[-1], grid, num_prefix, width)
    assert (shape.side, shape.grid, shape.num_prefix, shape.width) == expected_shape
    expected = as_tokens(own(pixels).last_hidden_state)
    assert expected.std() > 0.1
    found = features(tower, pixels)
    assert found.shape == (2, grid**2, width) and not found.requires_grad
    assert_close(found, expected[:, num_prefix:])
    assert count_image_tokens(shape, keep_cls=False) == grid**2
    assert measure(processor).side == shape.side


@KINDS
@torch.no_grad()
def test_keep_cls_keeps_cls_and_registers_or_is_refused(towers, kind):
    folder, own, pixels = towers[kind]
    _, _, num_prefix, grid, _ = TOWERS[kind]
    tower, shape = load_vision_tower(folder), read_tower_shape(folder)
    if not num_prefix:
        for call in (
            lambda: features(tower, pixels, keep_cls=True),
            lambda: count_image_tokens(shape, keep_cls=True),
        ):
            with pytest.raises(ValueError, match=r"--keep_cls 1: a \S+ tower has no CLS token"):
                call()
        return
    found = features(tower, pixels, keep_cls=True)
    assert_close(found, own(pixels).last_hidden_state)
    assert found.shape[1] == count_image_tokens(shape, keep_cls=True) == num_prefix + grid**2


@KINDS
@torch.no_grad()
def test_vision_layer_indexes_the_hidden_states(towers, kind):
    folder, own, pixels = towers[kind]
    tower, num_prefix = load_vision_tower(folder), TOWERS[kind][2]
    states = own(pixels, output_hidden_states=True).hidden_states
    for layer in (-2, 0, len(states) - 1):
        expected = as_tokens(states[layer])[:, num_prefix:]
        assert_close(features(tower, pixels, vision_layer=layer), expected)
        shape = read_tower_shape(folder, vision_layer=layer)
        assert (shape.grid**2, shape.width) == expected.shape[1:]
    for layer in (len(states), -len(states) - 1):
        message = f"--vision_layer {layer}: this .* has hidden states 0 to {len(states) - 1}, or "
        with pytest.raises(ValueError, match=message):
            features(tower, pixels, vision_layer=layer)
        with pytest.raises(ValueError, match=message):
            read_tower_shape(folder, vision_layer=layer)


@KINDS
@torch.no_grad()
def test_image_size_interpolates_the_positions(towers, kind):
    folder, own, pixels = towers[kind]
    side = 2 * pixels.shape[-1]
    tower, processor = MiniMindVLM.get_vision_model(folder, image_size=side)
    shape = read_tower_shape(folder, image_size=side)
    assert measure(processor).side == shape.side == side
    assert shape.grid == 2 * TOWERS[kind][3]
    pixels = torch.nn.functional.interpolate(pixels, size=side, mode="bicubic")
    options = {"interpolate_pos_encoding": True} if kind in ("clip", "siglip", "vit") else {}
    expected = as_tokens(own(pixels, **options).last_hidden_state)[:, shape.num_prefix :]
    found = features(tower, pixels)
    assert found.shape == (2, shape.grid**2, shape.width)
    assert_close(found, expected)
    last = features(tower, pixels, vision_layer=-1)
    assert last.shape[1] == read_tower_shape(folder, image_size=side, vision_layer=-1).grid ** 2


def test_image_size_must_be_whole_patches(towers):
    folder = towers["clip"][0]
    with pytest.raises(ValueError, match=r"--image_size 36 is no multiple .* of 8 pixels; take 32"):
        read_tower_shape(folder, image_size=36)
    with pytest.raises(ValueError, match=r"--image_size 3 is no multiple .* take 8"):
        read_tower_shape(folder, image_size=3)


def test_last_state_of_clip_is_before_its_norm_and_of_siglip_after_it(towers):
    for kind, is_after in (("clip", False), ("siglip", True)):
        folder, own, pixels = towers[kind]
        before = as_tokens(own(pixels, output_hidden_states=True).hidden_states[-1])
        expected = own.post_layernorm(before) if is_after else before
        found = features(load_vision_tower(folder), pixels)
        assert_close(found, expected[:, TOWERS[kind][2] :])


def test_token_merge_must_divide_the_grid(towers):
    shape = TowerShape("siglip_vision_model", side=224, grid=14, num_prefix=0, width=24)
    counts = {m: count_image_tokens(shape, keep_cls=False, token_merge=m) for m in (1, 2, 7, 14)}
    assert counts == {1: 196, 2: 49, 7: 4, 14: 1}
    for merge in (3, 0, 28):
        message = rf"--token_merge {merge} does not divide the 14x14 grid .* take 1, 2, 7, 14$"
        with pytest.raises(ValueError, match=message):
            count_image_tokens(shape, keep_cls=False, token_merge=merge)


@KINDS
@pytest.mark.parametrize("generation", [2, 3])
@torch.no_grad()
def test_model_sees_through_each_tower(towers, assets, tmp_path, kind, generation):
    """From the folder alone: placeholder, width, merged tokens, an answer that depends on them."""
    folder, _, pixels = towers[kind]
    _, _, num_prefix, grid, width = TOWERS[kind]
    make_tokenizer3(tmp_path / "tokenizer")
    tokenizer = load_tokenizer((assets, tmp_path)[generation - 2] / "tokenizer")
    own = {"generation": generation, "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 420}
    layer = None if kind == "efficientnet" else -2
    wanted = {"token_merge": 2, "vision_layer": layer, "initializer_range": 0.3}
    grid, width = (8, 8) if kind in MAPS[:3] else (grid, width)  # of the stage before the last
    config = placeholder_config(own | wanted, tokenizer, folder)
    assert (config.num_image_tokens, config.vision_hidden_size) == (grid**2 // 4, width)
    assert len(config.placeholder_ids) == grid**2 // 4
    assert len(config.image_ids) == (1 if generation == 3 else grid**2 // 4)
    model = MiniMindVLM(config, vision_model_path=folder).eval()
    patches = features(model.vision_encoder, pixels, vision_layer=layer)
    layers = model.vision_proj.mlp if generation == 3 else model.vision_proj.vision_proj
    assert_close(model.encode_images(pixels), layers(merge_patches(patches, 2)))
    ids = torch.tensor([[50, *config.placeholder_ids, 51]])
    one, other = (model(ids, pixel_values=image[None]).logits for image in pixels)
    assert one.isfinite().all() and (one - other)[0, -1].abs().max() > 1e-3


def test_model_refuses_what_its_tower_cannot_give(towers):
    clip, resnet = towers["clip"][0], towers["resnet"][0]
    tokens = {
        "vocab_size": 400,
        "image_ids": [34],
        "image_special_token": "@",
        "vision_hidden_size": 24,
    }
    for folder, fields, message in (
        (clip, {"token_merge": 3, "image_token_len": 1}, "--token_merge 3 does not divide the 4x4"),
        (clip, {"vision_layer": 5, "image_token_len": 16}, "--vision_layer 5: this clip"),
        (resnet, {"keep_cls": True, "image_token_len": 17}, "--keep_cls 1: a resnet tower"),
        (clip, {"token_merge": 2, "image_token_len": 16}, "gives 4 tokens per image but the place"),
        (resnet, {"image_token_len": 16}, "this tower is 12 wide but the projection takes 24"),
    ):
        with pytest.raises(ValueError, match=message):
            MiniMindVLM(VLMConfig(**(TINY_MODEL | tokens | fields)), vision_model_path=folder)


def test_dino_takes_the_side_of_its_preprocessing(tmp_path):
    """As published: the config's 518 pixels are those of pretraining, pictures have 224."""
    own = make_tower_of("dinov2", tmp_path, fields={"image_size": 56})
    shape, pixels = read_tower_shape(tmp_path), torch.randn(1, 3, 32, 32)
    assert (shape.side, shape.grid) == (32, 4)
    with torch.no_grad():
        expected = own(pixels).last_hidden_state[:, 1:]
    assert_close(features(load_vision_tower(tmp_path), pixels), expected)
    make_tower_of("vit", tmp_path / "vit", fields={"image_size": 56})
    with pytest.raises(ValueError, match="pictures of 32x32 but the tower takes 56x56"):
        read_tower_shape(tmp_path / "vit")


def test_parts_that_are_not_read_may_be_there_or_not(towers, tmp_path):
    """A classifier has no pooler, a full SigLIP has a text tower, and a head."""
    own = towers["vit"][1]
    classifier = randomise(transformers.ViTForImageClassification(own.config))
    classifier.save_pretrained(tmp_path / "vit")
    pixels = towers["vit"][2]
    with torch.no_grad():
        expected = classifier.vit(pixels).last_hidden_state[:, 1:]
    assert_close(features(load_vision_tower(tmp_path / "vit"), pixels), expected)
    text = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2}  # fmt: skip
    vision = towers["siglip"][1].config.to_dict()
    full = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=vision)
    )
    randomise(full).save_pretrained(tmp_path / "siglip")
    tower = load_vision_tower(tmp_path / "siglip")
    assert not any("text" in name or "head" in name for name in tower.state_dict())
    with torch.no_grad():
        expected = full.vision_model(pixels).last_hidden_state
    assert_close(features(tower, pixels), expected)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "bert"}, "'bert' is no vision tower known here; known are clip, siglip, "),
        ({}, "model_type None is no vision tower known here; .*, dinov3_vit, resnet, convnext, "),
        (
            {"model_type": "siglip2_vision_model"},
            r"of variable resolution \(NaFlex\)",
        ),
        ({"model_type": "vit", "num_channels": 1}, "takes 1 channels, but pictures have 3"),
        ({"model_type": "vit", "image_size": [32, 64]}, r"image_size \[32, 64\] is not square"),
        ({"model_type": "vit", "hidden_size": "wide"}, "config.json cannot be read"),
        ("{", "config.json cannot be read"),
    ],
)
def test_folder_of_another_kind_is_one_clear_line(tmp_path, config, message):
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_tower_shape(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["siglip", "dinov3", "efficientnet"])
def test_damaged_weights_are_one_clear_line(towers, tmp_path, kind):
    config = towers[kind][1].config
    state = towers[kind][1].state_dict()
    name = next(n for n in list(state)[2:] if state[n].ndim > 1 and "token" not in n)
    for change, message in (
        (lambda s: s.pop(name), "1 tensors of the vision tower are missing or of another size"),
        (lambda s: s.update({name: state[name][:-1]}), "weights cannot be read|of another size"),
    ):
        changed = dict(state)
        change(changed)
        towers[kind][1].save_pretrained(tmp_path, state_dict=changed)
        with pytest.raises(ValueError, match=message) as caught:
            load_vision_tower(tmp_path)
        assert "\n" not in str(caught.value)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="weights cannot be read .*fetch the folder again"):
        load_vision_tower(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="weights cannot be read"):
        load_vision_tower(tmp_path)
    assert config.model_type == load_vision_config(tmp_path).model_type


@KINDS
def test_tower_hash_follows_the_first_and_the_last_tensors(towers, kind):
    tower = load_vision_tower(towers[kind][0])
    before = tower_sha256(tower)
    assert before == tower_sha256(load_vision_tower(towers[kind][0]))
    matrices = [p for p in tower.parameters() if p.ndim > 1]
    last_norm = [n for n, _ in tower.named_parameters()][-1]
    for parameter in (matrices[0], tower.get_parameter(last_norm)):
        with torch.no_grad():
            parameter.add_(1e-3)
        after = tower_sha256(tower)
        assert after != before
        before = after
    if kind in ("clip", "siglip"):  # as in weights that were saved before there were other kinds
        digest = hashlib.sha256()
        for name, tensor in tower.state_dict().items():
            if re.search("embedding|post_layernorm", name):
                digest.update(tensor.numpy().tobytes())
        assert digest.hexdigest() == before


@KINDS
def test_lightened_tower_keeps_its_bits(towers, kind):
    folder, _, pixels = towers[kind]
    holder = torch.nn.Module()
    holder.vision_encoder = load_vision_tower(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = features(holder.vision_encoder, pixels)
        lighten_tower(holder, "bfloat16")
        after = features(holder.vision_encoder, pixels)
    assert torch.equal(before, after)
    assert torch.bfloat16 in {p.dtype for p in holder.vision_encoder.parameters()}


def test_default_folder_and_advice_follow_the_generation(tmp_path, monkeypatch):
    here = tmp_path / "model"
    third = replace(GENERATIONS[3], vision_dir=here / "siglip")
    monkeypatch.setitem(GENERATIONS, 3, third)
    with pytest.raises(FileNotFoundError, match=r"python dataset/download.py vision3`"):
        find_vision_dir(generation=3)
    with pytest.raises(FileNotFoundError, match=r"python dataset/download.py vision`"):
        find_vision_dir(tmp_path / "gone")
    make_tower_of("siglip", here / "siglip")
    make_tower_of("dinov2", here / "other")
    assert find_vision_dir(generation=3) == here / "siglip"
    assert find_vision_dir(named="other", generation=3) == here / "other"
    assert find_vision_dir(named="gone", generation=3) == here / "siglip"


@pytest.mark.parametrize(
    "kind, fields, first, side",
    [
        ("siglip", {"token_merge": 2, "image_token_len": 4}, 0, 2),
        ("dinov2_registers", {"keep_cls": True, "image_token_len": 20}, 4, 4),
        ("resnet", {"vision_hidden_size": 12, "image_token_len": 16}, 0, 4),
    ],
)
def test_overlay_shows_each_patch_at_its_place(
    towers, assets, monkeypatch, kind, fields, first, side
):
    tokens = {"image_ids": [34], "image_special_token": "@"}
    config = VLMConfig(**(make_loaded(assets).model.config.to_dict() | tokens | fields))
    model = MiniMindVLM(config, vision_model_path=towers[kind][0]).eval()
    ids = torch.tensor([[50, *config.placeholder_ids, *config.placeholder_ids, 51]])
    batch = {"input_ids": ids, "image_mask": ids == 34, "pixel_values": towers[kind][2]}
    monkeypatch.setattr(
        "model.generation.attention_map._mean_attention",
        lambda _model, embeds, _first, layer: torch.arange(embeds.shape[1]).float(),
    )
    maps = image_attention(model, batch, torch.tensor([[60]]), layer=None)
    for image, shown in enumerate(maps):
        start = 1 + image * config.num_image_tokens + first
        expected = torch.arange(start, start + side * side).float().view(side, side)
        assert torch.equal(shown, expected)
    assert len(maps) == 2
