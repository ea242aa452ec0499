"""Owns the kinds of vision towers: the library's classes of each, and what they take."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class TowerKind:
    """One kind of tower, by the names of the library's classes.

    processor: a key of `preprocessing.PIL_CLASSES`, for a folder without a preprocessing file.
    num_prefix: R of a config, for a tower of tokens; None for one that gives a feature map.
    takes_any_side: whether the preprocessing may choose S; else the config does.
    is_imagenet: whether the published ones normalise by ImageNet's mean and deviation.
    config_fields, options: set so that the pooler, which is not read, is not built.
    """

    name: str
    processor: str
    num_prefix: Callable[[Any], int] | None = None
    takes_any_side: bool = True
    is_imagenet: bool = True
    config_fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        cls: type[PreTrainedConfig] = getattr(transformers, f"{self.name}Config")
        return cls

    @property
    def model_class(self) -> type[PreTrainedModel]:
        cls: type[PreTrainedModel] = getattr(transformers, f"{self.name}Model")
        return cls


KINDS = {
    "clip_vision_model": TowerKind(
        "CLIPVision", "CLIPImageProcessor", lambda _: 1, takes_any_side=False, is_imagenet=False
    ),
    "siglip_vision_model": TowerKind(
        "SiglipVision",
        "SiglipImageProcessor",
        lambda _: 0,
        takes_any_side=False,
        is_imagenet=False,
        config_fields={"vision_use_head": False},
    ),
    "vit": TowerKind(
        "ViT",
        "ViTImageProcessor",
        lambda _: 1,
        takes_any_side=False,
        is_imagenet=False,
        options={"add_pooling_layer": False},
    ),
    "dinov2": TowerKind("Dinov2", "BitImageProcessor", lambda _: 1),
    "dinov2_with_registers": TowerKind(
        "Dinov2WithRegisters", "BitImageProcessor", lambda config: 1 + config.num_register_tokens
    ),
    "dinov3_vit": TowerKind(
        "DINOv3ViT", "DINOv3ViTImageProcessor", lambda config: 1 + config.num_register_tokens
    ),
    "resnet": TowerKind("ResNet", "ConvNextImageProcessor"),
    "convnext": TowerKind("ConvNext", "ConvNextImageProcessor"),
    "convnextv2": TowerKind("ConvNextV2", "ConvNextImageProcessor"),
    "efficientnet": TowerKind("EfficientNet", "EfficientNetImageProcessor"),
}
