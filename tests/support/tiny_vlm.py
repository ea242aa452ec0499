"""Offers a tiny model that needs no training (its weights are wide enough that pictures and words
change its answer), conversations for it, and its answers by the plainest loop.
"""

from pathlib import Path

import torch
from PIL import Image
from support.tiny_parts import TINY_MODEL

from model.generation.engine import ask
from model.generation.sampling import Sampling
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vlm_processor import VLMProcessor, load_tokenizer, tokenizer_sha256
from model.weights.build_model import LoadedModel
from model.weights.metadata import describe_model
from model.weights.saving import save_weights

NUM_TOKENS, NEW_TOKENS, VOCAB = 16, 24, 400
GREEDY = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)


def make_loaded(assets, **fields) -> LoadedModel:
    """Weights wide enough (0.3) that pictures and words change the answer."""
    torch.manual_seed(0)
    placeholder = {"image_special_token": "@" * NUM_TOKENS, "image_ids": [34] * NUM_TOKENS}
    own = {"vocab_size": VOCAB, "vision_hidden_size": 24, "initializer_range": 0.3}
    config = VLMConfig(**(TINY_MODEL | own | placeholder | fields))
    model = MiniMindVLM(config, vision_model_path=assets / "tower").eval().requires_grad_(False)
    tokenizer = load_tokenizer(assets / "tokenizer")
    processor = VLMProcessor(tokenizer, model.image_processor, config=config)
    return LoadedModel(model, processor, assets, can_see=True)


def picture(factor: int) -> Image.Image:
    """Rings; their number grows with the factor."""
    rings = Image.radial_gradient("L").resize((40, 36)).convert("RGB")
    return rings.point(lambda value: value * factor % 256)


def conversations() -> list[tuple[list[dict], list]]:
    """Samples with 0, 1 and 2 pictures, of different lengths."""
    few, many = picture(6), picture(9)
    return [
        (ask("What is a circle?", num_images=0), []),
        (ask("<image>\nWhat is in the picture?", num_images=1), [few]),
        (ask("图像里有什么？ <image> or <image>?", num_images=2), [many, few]),
    ]


@torch.no_grad()
def naive_greedy_ids(loaded: LoadedModel, sample: tuple) -> list[int]:
    """One forward of everything for each token: no cache, no padding, no `generate`."""
    batch = loaded.processor.prompt_batch([sample])
    ids, start = batch["input_ids"], batch["input_ids"].shape[1]
    for _ in range(NEW_TOKENS):
        logits = loaded.model(ids, pixel_values=batch["pixel_values"]).logits[0, -1]
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
        if ids[0, -1] == loaded.processor.tokenizer.eos_token_id:
            break
    return ids[0, start:].tolist()


def never_end(model: MiniMindVLM) -> None:
    """Keep a model from saying its end token: every answer is as long as it may be."""

    def without_end(_module, _args, logits):
        logits[..., model.config.eos_token_id] = -torch.inf

    model.lm_head.register_forward_hook(without_end)


def save_tiny(loaded: LoadedModel, path: Path) -> None:
    """As training saves it, with its description."""
    sha256 = tokenizer_sha256(loaded.processor.tokenizer)
    save_weights(loaded.model, path, describe_model(loaded.model, tokenizer_sha256=sha256))


def round_weights(loaded: LoadedModel) -> None:
    """To what the file of `save_tiny` holds; the tower is not in it."""
    for name, weight in loaded.model.named_parameters():
        if not name.startswith("vision_encoder."):
            weight.copy_(weight.half())
