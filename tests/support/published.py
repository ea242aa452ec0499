"""Offers the published layout of a generation on a fake hub, with tiny weights, and a training on
the built-in questions of `dataset/check_published.py` that takes seconds.
"""

import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from support.fake_hub import pin

from dataset import check_published
from dataset.fetching import assets as manifest
from model.evaluation.likelihood import LabelledSequence
from model.weights.build_model import LoadedModel
from model.weights.saving import half_state

STEPS = 30
CLIP_PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}
SIGLIP_PREPROCESSING = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
GENERATIONS = {
    2: ("vision", "tokenizer", CLIP_PREPROCESSING, manifest.TOKENIZER_SHA256),
    3: ("vision3", "tokenizer3", SIGLIP_PREPROCESSING, manifest.TOKENIZER3_SHA256),
}


def publish_assets(hub, monkeypatch, assets: Path, *, generation: int) -> None:
    """Put `tower` and `tokenizer` of a folder where the hub has the real ones."""
    vision, tokenizer, preprocessing, pins = GENERATIONS[generation]
    files = {p.name: p.read_bytes() for p in (assets / "tower").iterdir()}
    files["preprocessor_config.json"] = json.dumps(preprocessing).encode()
    hub.files[manifest.ASSETS[vision].huggingface.repo] = files
    if generation == 3:
        pin(monkeypatch, manifest.SIGLIP_SHA256, "model.safetensors", files["model.safetensors"])
    files = {p.name: p.read_bytes() for p in (assets / "tokenizer").iterdir()}
    hub.files[manifest.ASSETS[tokenizer].huggingface.repo] = files
    pin(monkeypatch, pins, "tokenizer.json", files["tokenizer.json"])


def publish_weight(hub, name: str, state: dict[str, torch.Tensor]) -> None:
    """Put a weight where the hub has the real one: a plain fp16 state dict without the tower."""
    buffer = io.BytesIO()
    torch.save(half_state(state), buffer)
    asset = manifest.ASSETS[name]
    hub.files[asset.huggingface.repo][asset.files[0].split("|")[0]] = buffer.getvalue()


def train_on_questions(loaded: LoadedModel) -> None:
    """Learn the built-in answers, and the captions with their pictures, by heart."""
    model, images = loaded.model, check_published.pictures()
    pixels = loaded.processor.pixel_values(images)
    texts = [
        check_published.labelled(loaded, *p)
        for some in check_published.TEXTS.values()
        for p in some
    ]
    captions = [
        check_published.labelled(loaded, check_published.QUESTIONS[language], caption, [image])
        for language, some in check_published.CAPTIONS.items()
        for caption, image in zip(some, images, strict=True)
    ]
    trained = [p for n, p in model.named_parameters() if not n.startswith("vision_encoder.")]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for some, pictures in ((texts, None), (captions, pixels.repeat(2, 1, 1, 1))):
            _loss(loaded, some, pictures).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    model.requires_grad_(False)


def _loss(
    loaded: LoadedModel, sequences: list[LabelledSequence], pictures: torch.Tensor | None
) -> torch.Tensor:
    width = max(len(s.input_ids) for s in sequences)
    ids, labels = (
        torch.stack(
            [F.pad(getattr(s, name), (0, width - len(s.input_ids)), value=fill) for s in sequences]
        )
        for name, fill in (("input_ids", 0), ("labels", -100))
    )
    logits = loaded.model(ids, pixel_values=pictures).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
