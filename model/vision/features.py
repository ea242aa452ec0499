"""Owns computing what a model's frozen tower says of pictures apart from the model, to be kept.

The features are those of `MiniMindVLM.get_image_embeddings`: after `vision_layer` and `keep_cls`,
before `token_merge` and the projection, in float32 whatever the model computes in, so that all
runs and scores can share them.

Shapes: I images, S image side in pixels, P patches (prefix included), V width of the tower.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.model_vlm import MiniMindVLM
from model.vision_tower import load_vision_tower, tower_features
from model.vlm_processor import VLMProcessor
from model.weights.metadata import tower_sha256

# Of a config or preprocessing file: who wrote it and from where; no number depends on these.
NOT_NUMBERS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


class FeatureMaker:
    """Computes features for a cache.

    Args:
        model: with its tower. A tower that is not in float32 is read from its folder again.
        processor: of this model.
        batch_size: pictures in a forward pass of the tower.
    Raises:
        ValueError: the model has no tower.
    """

    def __init__(self, model: MiniMindVLM, processor: VLMProcessor, *, batch_size: int):
        if model.vision_encoder is None:
            raise ValueError("this model has no vision tower, so there are no features to keep")
        self._config, self._device, self._processor = model.config, model.device, processor
        self._tower: PreTrainedModel = model.vision_encoder
        if any(p.dtype != torch.float32 for p in self._tower.parameters()):
            self._tower = load_vision_tower(model.vision_dir)
            self._tower.to(model.device)  # type: ignore[arg-type]  # its wrapper hides Module.to
        self.batch_size = batch_size
        self.width: int = model.config.vision_hidden_size
        self.num_patches: int = model.config.num_image_tokens * model.config.token_merge**2

    def describe(self) -> dict[str, Any]:
        """All that the features depend on besides the picture, for JSON."""
        return {
            "vision_tower_sha256": tower_sha256(self._tower),
            "all_weights_sha256": all_weights_sha256(self._tower),
            "tower": plain_fields(self._tower.config.to_dict()),
            "preprocessing": plain_fields(self._processor.image_processor.to_dict()),
            "vision_layer": self._config.vision_layer,
            "keep_cls": bool(self._config.keep_cls),
            "num_patches": self.num_patches,
            "width": self.width,
        }

    def preprocess(self, image: bytes) -> Tensor:
        """(1, 3, S, S) of an encoded picture; raises as `VLMProcessor.pixel_values`."""
        return self._processor.pixel_values([image])

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:  # (I, 3, S, S)
        """(I, P, V) float32, on the CPU."""
        with torch.autocast(self._device.type, enabled=False):
            features = tower_features(
                self._tower,
                pixel_values.to(self._device),
                keep_cls=self._config.keep_cls,
                vision_layer=self._config.vision_layer,
            )
        return features.to("cpu", torch.float32)


def all_weights_sha256(tower: nn.Module) -> str:
    """A hash of all of a tower's tensors: `tower_sha256` covers the first and last alone."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def plain_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config, without who wrote it and from where."""
    return {name: value for name, value in fields.items() if name not in NOT_NUMBERS}
