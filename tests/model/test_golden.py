"""If this fails, weights of the original MiniMind-V no longer give its numbers. Compared are the
golden tensors of ../shared/reference, made by the original programs (float32, CPU).
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dataset.loss_mask import supervised_mask
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vlm_processor import VLMProcessor, load_tokenizer
from model.weights.strict_loading import (
    load_weights,
    read_weights,
    sizes_from_tensors,
    weight_config,
)

torch.set_num_threads(1)  # at these sizes more threads only wait for each other
TOLERANCE = 1e-4  # the contract's bar: max abs difference of logits and features
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
LLMS = pytest.mark.parametrize("name", ["llm_dense", "llm_moe"])
CASES = {"single": (2, 1), "multi": (2, 2), "multi_bs1": (1, 2)}  # samples, images of each
# Generation 3: which pictures stand in which case, all of them of one batch in reading order.
CASES3 = {"single": slice(0, 2), "multi": slice(2, 4)}


@pytest.fixture(scope="module")
def reference(shared) -> Path:
    return shared / "reference"


@pytest.fixture(scope="module")
def golden(reference) -> dict[str, torch.Tensor]:
    return load_file(reference / "vlm_64.safetensors")


@pytest.fixture(scope="module")
def vlm(reference) -> MiniMindVLM:
    config = VLMConfig(**json.loads((reference / "vlm_64.json").read_text()))
    model = MiniMindVLM(config, vision_model_path=reference / "tiny-clip-vit-patch16")
    path = reference / "vlm_64.pth"
    assert load_weights(model, read_weights(path), path=path, may_lack_projection=False)
    return model.eval()


@pytest.fixture(scope="module")
def pixels(reference, vlm) -> torch.Tensor:
    """The four pictures, preprocessed: (4, 3, 224, 224)."""
    pictures = [Image.open(path) for path in sorted(reference.glob("image-*.jpg"))]
    assert len(pictures) == 4
    return torch.cat([vlm.image2tensor(p, vlm.image_processor) for p in pictures])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@LLMS
@ATTENTION
@torch.no_grad()
def test_golden_llm_logits(reference, name, attention):
    model = MiniMindForCausalLM(
        MiniMindConfig(**json.loads((reference / f"{name}.json").read_text()))
    )
    path = reference / f"{name}.pth"
    load_weights(model, read_weights(path), path=path, may_lack_projection=False)
    model.eval().set_attn_implementation(attention)
    tensors = load_file(reference / f"{name}.safetensors")
    assert_close(model(tensors["input_ids"]).logits, tensors["logits"])


@pytest.mark.parametrize("name", ["llm_dense", "llm_moe", "vlm_64"])
def test_golden_sizes_are_read_off_the_tensors(reference, tmp_path, name):
    path = tmp_path / f"{name}.pth"  # away from its .json, as published weights come
    path.symlink_to(reference / f"{name}.pth")
    described = json.loads((reference / f"{name}.json").read_text())
    state = read_weights(path)
    sizes = sizes_from_tensors(state, path=path)
    assert sizes["use_moe"] == (name == "llm_moe")
    assert sizes["intermediate_size"] == 192  # 64 * ceil(int(64 * 8 / 3) / 64)
    if name == "llm_moe":
        assert (sizes["n_routed_experts"], sizes["n_shared_experts"]) == (4, 1)
    if name == "vlm_64":
        assert sizes["vision_hidden_size"] == 768
    shown = described.keys() & sizes.keys()
    assert {k: sizes[k] for k in shown} == {k: described[k] for k in shown} and len(shown) >= 4
    config = VLMConfig(**weight_config(state, path=path, flags={}))
    load_weights(MiniMindVLM(config), state, path=path, may_lack_projection=True)


def test_golden_preprocessing(golden, pixels):
    assert_close(pixels[:2].unsqueeze(1), golden["single.pixel_values"])


def test_golden_preprocessing_of_the_processor(reference, golden, vlm):
    tokenizer = load_tokenizer(reference / "minimind_tokenizer")
    processor = VLMProcessor(tokenizer, vlm.image_processor, config=vlm.config)
    paths = sorted(reference.glob("image-*.jpg"))[:2]
    assert_close(processor.pixel_values(paths), golden["single.pixel_values"].flatten(0, 1))
    encoded = [path.read_bytes() for path in paths]
    assert_close(processor.pixel_values(encoded), golden["single.pixel_values"].flatten(0, 1))


@torch.no_grad()
def test_golden_vision_features(golden, vlm):
    pixels = golden["single.pixel_values"].flatten(0, 1)
    patches = vlm.get_image_embeddings(pixels, vlm.vision_encoder)
    assert_close(patches, golden["vision.patch_embeddings"])
    assert_close(vlm.vision_proj(patches), golden["vision.projected"])
    assert_close(vlm.encode_images(pixels), golden["vision.projected"])


@pytest.mark.parametrize("layout", ["(B,N,1,3,H,W)", "(B,N,3,H,W)", "(I,3,H,W)"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_golden_vlm_logits(golden, vlm, pixels, case, layout):
    samples, images = CASES[case]
    given = pixels[: samples * images]
    if layout != "(I,3,H,W)":
        given = given.unflatten(0, (samples, images))
    if layout == "(B,N,1,3,H,W)":
        given = given.unsqueeze(2)
    logits = vlm(golden[f"{case}.input_ids"], pixel_values=given).logits
    assert_close(logits[:, -8:], golden[f"{case}.logits_last8"])
    # The pictures matter to these logits: swapped, they differ by far more than the tolerance.
    swapped = vlm(golden[f"{case}.input_ids"], pixel_values=given.flip(0, 1)).logits
    assert (swapped[:, -8:] - golden[f"{case}.logits_last8"]).abs().max() > 100 * TOLERANCE


@ATTENTION
@torch.no_grad()
def test_golden_vlm_text_logits(golden, vlm, attention):
    vlm.set_attn_implementation(attention)
    try:
        logits = vlm(golden["text.input_ids"]).logits
    finally:
        vlm.set_attn_implementation("sdpa")
    assert_close(logits[:, -8:], golden["text.logits_last8"])


def test_golden_loss_mask(reference):
    tokenizer = load_tokenizer(reference / "minimind_tokenizer")
    cases = json.loads((reference / "loss_mask.json").read_text())
    assert len(cases) >= 3
    for case in cases:
        assert supervised_mask(case["input_ids"], tokenizer) == case["labels_mask"]


def test_golden_prompt_and_mask_from_conversations(reference, vlm):
    tokenizer = load_tokenizer(reference / "minimind_tokenizer")
    processor = VLMProcessor(tokenizer, vlm.image_processor, config=vlm.config)
    for case in json.loads((reference / "loss_mask.json").read_text()):
        messages = case["conversations"]
        assert processor.render(messages) == case["prompt"]
        num_images = sum(m["content"].count("<image>") for m in messages)
        pictures = [Image.new("RGB", (20, 20))] * num_images
        encoded = processor(messages, pictures, max_length=case["max_length"])
        ids = encoded["input_ids"].tolist()
        assert ids == case["input_ids"]
        assert supervised_mask(ids, tokenizer) == case["labels_mask"]
        assert encoded["image_mask"].tolist() == [i == 34 for i in ids]
        assert not encoded["is_truncated"]


@pytest.fixture(scope="module", params=["vlm3_64", "vlm3_64_moe"])
def third(reference, request) -> tuple[MiniMindVLM, dict[str, torch.Tensor]]:
    """The model of generation 3, and its golden tensors."""
    path = reference / f"{request.param}.pth"
    fields = json.loads(path.with_suffix(".json").read_text())
    config = VLMConfig(generation=3, **fields)
    model = MiniMindVLM(config, vision_model_path=reference / "tiny-siglip-p32-256")
    assert load_weights(model, read_weights(path), path=path, may_lack_projection=False)
    return model.eval(), load_file(path.with_suffix(".safetensors"))


@pytest.mark.parametrize("name", ["llm3_dense", "llm3_moe"])
@ATTENTION
@torch.no_grad()
def test_golden_llm_logits_of_generation_3(reference, name, attention):
    path = reference / f"{name}.pth"
    fields = json.loads(path.with_suffix(".json").read_text())
    model = MiniMindForCausalLM(MiniMindConfig(generation=3, **fields))
    load_weights(model, read_weights(path), path=path, may_lack_projection=False)
    model.eval().set_attn_implementation(attention)
    tensors = load_file(path.with_suffix(".safetensors"))
    assert_close(model(tensors["input_ids"]).logits, tensors["logits"])


@torch.no_grad()
def test_golden_vision_of_generation_3(reference, third):
    model, expected = third
    paths = sorted(reference.glob("image-*.jpg"))
    pixels = torch.cat([model.image2tensor(Image.open(p), model.image_processor) for p in paths])
    assert_close(pixels, expected["pixel_values"])
    patches = model.get_image_embeddings(pixels[:2], model.vision_encoder)
    assert_close(patches, expected["vision.patch_embeddings"])
    assert_close(model.encode_images(pixels[:2]), expected["vision.projected"])


@pytest.mark.parametrize("case", CASES3)
@ATTENTION
@torch.no_grad()
def test_golden_vlm_logits_of_generation_3(third, case, attention):
    model, expected = third
    ids, pixels = expected[f"{case}.input_ids"], expected["pixel_values"][CASES3[case]]
    model.set_attn_implementation(attention)
    try:
        logits = model(ids, pixel_values=pixels).logits[:, -8:]
    finally:
        model.set_attn_implementation("sdpa")
    assert_close(logits, expected[f"{case}.logits_last8"])
    swapped = model(ids, pixel_values=pixels.flip(0)).logits[:, -8:]
    assert (swapped - expected[f"{case}.logits_last8"]).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_golden_vlm_text_logits_of_generation_3(third):
    model, expected = third
    assert_close(model(expected["text.input_ids"]).logits[:, -8:], expected["text.logits_last8"])


@pytest.mark.parametrize("use_moe, expected", [(False, 65_094_912), (True, 199_599_360)])
def test_model_size_of_generation_3_is_the_published_one(use_moe, expected):
    with torch.device("meta"):
        model = MiniMindVLM(VLMConfig(generation=3, use_moe=use_moe))
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (768, 8)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("which", ["with_empty_think", "without_empty_think"])
def test_golden_prompts_of_generation_3(reference, which):
    """Ids and loss mask exactly, the tower standing aside: pictures are given as pixels."""
    tokenizer = load_tokenizer(reference / "minimind3_tokenizer")
    processor = VLMProcessor(tokenizer, image_processor=None, config=VLMConfig(generation=3))
    cases = json.loads((reference / "prompts3.json").read_text())
    assert len(cases) == 3
    for case in cases:
        messages, expected = case["conversations"], case[which]
        is_kept = which == "with_empty_think"
        assert processor.render(messages, keep_empty_thinking=is_kept) == expected["prompt"]
        pixels = torch.zeros(sum(m["content"].count("<image>") for m in messages), 3, 8, 8)
        encoded = processor(
            messages, pixels, max_length=case["max_length"], keep_empty_thinking=is_kept
        )
        ids = encoded["input_ids"].tolist()
        assert ids == expected["input_ids"]
        assert supervised_mask(ids, tokenizer) == expected["labels_mask"]
        assert encoded["image_mask"].tolist() == [i == 12 for i in ids]
