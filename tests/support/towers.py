"""Offers a tiny random folder of each kind of vision tower, written by the library's own class."""

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

SIDE = 32  # of the pictures, but for EfficientNet
TOKENS = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 8,
}  # fmt: skip
MLP = {"intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 12], "depths": [1, 1]}
MAP = {"image_size": SIDE, "num_stages": 2, **STAGES}
SMALL = {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": 128}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# Kind -> the library's class, its config, prefix tokens, patches along a side, width.
TOWERS = {
    "clip": ("CLIPVision", TOKENS | MLP, 1, 4, 24),
    "siglip": ("SiglipVision", TOKENS | MLP, 0, 4, 24),
    "vit": ("ViT", TOKENS | MLP, 1, 4, 24),
    "dinov2": ("Dinov2", TOKENS, 1, 4, 24),
    "dinov2_registers": ("Dinov2WithRegisters", TOKENS | {"num_register_tokens": 3}, 4, 4, 24),
    "dinov3": ("DINOv3ViT", TOKENS | MLP | {"num_register_tokens": 2}, 3, 4, 24),
    "resnet": ("ResNet", {"embedding_size": 8, "layer_type": "basic", **STAGES}, 0, 4, 12),
    "convnext": ("ConvNext", MAP, 0, 4, 12),
    "convnextv2": ("ConvNextV2", MAP, 0, 4, 12),
    "efficientnet": ("EfficientNet", SMALL, 0, 4, 320),
}
SQUARE = {"height": SIDE, "width": SIDE}
CROP = {"size": {"shortest_edge": 36}, "crop_size": SQUARE}
EDGE = {"size": {"shortest_edge": SIDE}, "crop_pct": 0.875}
# Kind -> the library's preprocessing without torchvision, and what the folder says.
PROCESSORS = {
    "clip": ("CLIPImageProcessorPil", CROP),
    "siglip": ("SiglipImageProcessorPil", {"size": SQUARE, "resample": 2}),
    "vit": ("ViTImageProcessorPil", {"size": SQUARE}),
    "dinov2": ("BitImageProcessorPil", CROP | IMAGENET),
    "dinov2_registers": ("BitImageProcessorPil", CROP | IMAGENET),
    "dinov3": ("ViTImageProcessorPil", {"size": SQUARE} | IMAGENET),  # see preprocessing.py
    "resnet": ("ConvNextImageProcessorPil", EDGE | IMAGENET),
    "convnext": ("ConvNextImageProcessorPil", EDGE | IMAGENET),
    "convnextv2": ("ConvNextImageProcessorPil", EDGE | IMAGENET),
    "efficientnet": (
        "EfficientNetImageProcessorPil",
        {"size": {"height": 128, "width": 128}, "resample": 0} | IMAGENET,
    ),
}


def make_tower_of(kind: str, folder: Path, *, fields: dict | None = None) -> PreTrainedModel:
    """Write a tower and its preprocessing, and return the library's own model."""
    name, config = TOWERS[kind][0], make_config(kind, **(fields or {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise(getattr(transformers, f"{name}Model")(config))
    model.save_pretrained(folder)
    make_preprocessing(kind, folder)
    return model


def make_config(kind: str, **fields) -> PreTrainedConfig:
    """The library's config of a kind."""
    name, config, *_ = TOWERS[kind]
    return getattr(transformers, f"{name}Config")(**(config | fields))


def make_preprocessing(kind: str, folder: Path) -> None:
    """Write the file that a folder of this kind has."""
    name, options = PROCESSORS[kind]
    getattr(transformers, name)(**options).save_pretrained(folder)


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which every patch says something of its own; eval mode."""
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        nn.init.normal_(parameter, std=max(scale, 0.2))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()
