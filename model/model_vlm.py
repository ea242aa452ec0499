"""Owns the vision-language model: VLMConfig and MiniMindVLM.

Shapes: B batch, T tokens, I images of the whole batch, J more whose features are given, N of a
sample, G patches along a side, P image tokens, V width of the tower, D hidden, S side in pixels.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import LongTensor, Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.image_processing_utils import BaseImageProcessor

from model.cache_name import takes_past_key_values
from model.generations import GENERATIONS
from model.image_fusion import (
    check_features,
    check_image_count,
    check_placeholder,
    flat_images,
    fuse_images,
    images_per_sample,
    placeholder_mask,
)
from model.model_minimind import (
    MiniMindConfig,
    MiniMindForCausalLM,
    MiniMindOutput,
    of_generation,
)
from model.vision.pixels import PixelSteps
from model.vision.preprocessing import measure
from model.vision.projection import PROJECTORS, VisionProj
from model.vision_tower import (
    count_image_tokens,
    find_vision_dir,
    load_image_processor,
    load_vision_config,
    load_vision_tower,
    tower_features,
    tower_shape,
)


class VLMConfig(MiniMindConfig):
    """A `MiniMindConfig` and how images enter it.

    Args:
        image_special_token: the text that stands for one image, or the token that is repeated.
        image_ids: its token ids.
        image_token_len: the number of image tokens P: as many as `image_ids`, or how often the one
            id is repeated.
        vision_hidden_size: V; also `image_hidden_size`.
        keep_cls: whether the tower's CLS token, and its registers, precede the patches.
        vision_layer: which of the tower's hidden states is read; None means its last output.
        projector: "linear", or "mlp": LayerNorm and two layers.
        token_merge: m; m x m neighbouring patches become one image token.
        image_size: S, in pixels; None means what the tower's folder says.
    """

    model_type = "minimind-v"
    attribute_map = MiniMindConfig.attribute_map | {"image_hidden_size": "vision_hidden_size"}

    image_special_token: str = of_generation()
    image_ids: list[int] = of_generation()
    image_token_len: int = of_generation()
    vision_hidden_size: int = 768
    keep_cls: bool = False
    vision_layer: int | None = None
    projector: str = of_generation()
    token_merge: int = 1
    image_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.image_ids is not None and self.image_token_len is None and len(self.image_ids) > 1:
            self.image_token_len = len(self.image_ids)
        super().__post_init__(**kwargs)
        if self.image_special_token is None:
            token = GENERATIONS[self.generation].image_token
            self.image_special_token = token * len(self.image_ids)
        check_placeholder(self.image_ids)
        if len(self.image_ids) not in (1, self.image_token_len):
            raise ValueError(
                f"image_ids has {len(self.image_ids)} ids but image_token_len is "
                f"{self.image_token_len}; give one id, or as many"
            )
        if self.projector not in PROJECTORS:
            raise ValueError(
                f"projector {self.projector!r} is unknown; there are {', '.join(PROJECTORS)}"
            )
        if self.token_merge > 1 and self.keep_cls:
            raise ValueError("token_merge joins patches; it cannot keep the CLS token: keep_cls 0")

    @property
    def num_image_tokens(self) -> int:
        """P."""
        return self.image_token_len

    @property
    def placeholder(self) -> str:
        """The text that stands for one image."""
        return self.image_special_token * (self.image_token_len // len(self.image_ids))

    @property
    def placeholder_ids(self) -> list[int]:
        """The P ids of one image's placeholder."""
        return self.image_ids * (self.image_token_len // len(self.image_ids))


class MiniMindVLM(MiniMindForCausalLM):
    """The language model that reads projected image features in place of placeholders.

    Args:
        vision_model_path: folder of the tower; without one the model has no tower yet
            (`load_vision_encoder` adds it) and refuses images.
    """

    config: VLMConfig
    config_class = VLMConfig
    _keys_to_ignore_on_save = [r"^vision_encoder\."]
    _keys_to_ignore_on_load_missing = [r"^vision_encoder\."]
    _keys_to_ignore_on_load_unexpected = [r"^vision_encoder\."]

    def __init__(self, config: VLMConfig, vision_model_path: str | Path | None = None):
        super().__init__(config)
        self.vision_encoder: PreTrainedModel | None = None
        self.image_processor: BaseImageProcessor | None = None
        self.pixel_steps: PixelSteps | None = None  # for 8-bit pixel values
        self.vision_proj = VisionProj(
            config.vision_hidden_size,
            config.hidden_size,
            projector=config.projector,
            token_merge=config.token_merge,
        )
        self.post_init()
        if vision_model_path is not None:
            self.load_vision_encoder(vision_model_path)

    def load_vision_encoder(self, vision_model_path: str | Path) -> None:
        """Attach the frozen tower of a folder, on the model's device.

        Raises:
            FileNotFoundError: no tower there.
            ValueError: its width or number of tokens is not the config's, or its grid or layers do
                not allow what the config asks for.
        """
        folder = find_vision_dir(vision_model_path, generation=self.config.generation)
        tower, processor = self.get_vision_model(folder, image_size=self.config.image_size)
        side = measure(processor, where=str(folder)).side
        shape = tower_shape(tower.config, side=side, vision_layer=self.config.vision_layer)
        num_tokens = count_image_tokens(
            shape, keep_cls=self.config.keep_cls, token_merge=self.config.token_merge
        )
        if num_tokens != self.config.num_image_tokens:
            raise ValueError(
                f"{vision_model_path}: this tower gives {num_tokens} tokens per image but the "
                f"placeholder has {self.config.num_image_tokens}; use the tower this model was "
                "made with, or set --image_special_token and --keep_cls to match"
            )
        if shape.width != self.config.vision_hidden_size:
            raise ValueError(
                f"{vision_model_path}: this tower is {shape.width} wide but the "
                f"projection takes {self.config.vision_hidden_size}; use the tower and the "
                "--token_merge this model was made with"
            )
        tower.to(self.device)  # type: ignore[arg-type]  # its wrapper hides nn.Module.to
        self.vision_dir = folder.resolve()
        self.vision_encoder, self.image_processor = tower, processor

    @staticmethod
    def get_vision_model(
        path: str | Path, *, image_size: int | None = None
    ) -> tuple[PreTrainedModel, BaseImageProcessor]:
        """Tower and image processor of a folder."""
        folder = find_vision_dir(path)
        config = load_vision_config(folder)
        return load_vision_tower(folder), load_image_processor(
            folder, config, image_size=image_size
        )

    @staticmethod
    def image2tensor(image: Image.Image, processor: BaseImageProcessor) -> Tensor:
        """Preprocess one picture: (1, 3, S, S) float32."""
        pixels: Tensor = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        return pixels

    @staticmethod
    def get_image_embeddings(
        pixel_values: Tensor,
        vision_model: PreTrainedModel,
        *,
        keep_cls: bool = False,
        vision_layer: int | None = None,
    ) -> Tensor:
        """What the tower says of each patch of (I, 3, S, S); see `tower_features`."""
        return tower_features(
            vision_model, pixel_values, keep_cls=keep_cls, vision_layer=vision_layer
        )

    def train(self, mode: bool = True) -> "MiniMindVLM":
        """Like `nn.Module.train`; the tower stays in eval mode."""
        super().train(mode)
        if self.vision_encoder is not None:
            self.vision_encoder.eval()
        return self

    @takes_past_key_values
    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, past + T)
        pixel_values: Tensor | None = None,  # (I, 3, S, S), (B, N, 3, S, S) or (B, N, 1, 3, S, S)
        labels: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        image_mask: Tensor | None = None,  # (B, T) bool
        vision_features: Tensor | None = None,  # (J, G * G, V), or with a prefix
        has_features: Tensor | None = None,  # (I + J,) bool
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MiniMindOutput:
        """As `MiniMindForCausalLM.forward`, with images.

        Args:
            pixel_values: all images of the batch in reading order, or N for every sample; with
                `pixel_steps` also uint8, (I, 3, H, W).
            vision_features: images whose features, as `get_image_embeddings` gives them, were
                computed before; the tower does not see these.
            has_features: where both kinds are given: which images, in reading order, have features.
            image_mask: which positions are image tokens, as the collator gives it, already checked
                against the number of images. Without it they are found and counted here, at the
                cost of one host sync on a GPU.
        Raises:
            ValueError: a sample's placeholders and images differ in number.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self._embed(
                input_ids,
                pixel_values,
                image_mask,
                vision_features=vision_features,
                has_features=has_features,
            )
        elif pixel_values is not None or vision_features is not None:
            raise ValueError("images need input_ids, which say where they stand")
        return super().forward(
            None,
            attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            cache=cache,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_mask: Tensor | None,
        *,
        vision_features: Tensor | None = None,
        has_features: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids and the batch's images to (B, T, D)."""
        inputs_embeds: Tensor = self.model.embed_tokens(input_ids)
        images, per_sample = flat_images(pixel_values, batch_size=input_ids.shape[0])
        num_images = sum(len(some) for some in (images, vision_features) if some is not None)
        is_counted = image_mask is not None and not input_ids.is_cpu
        if image_mask is None:
            image_mask = placeholder_mask(input_ids, self.config.placeholder_ids)
        may_hold_images = num_images > 0 or input_ids.shape[1] >= self.config.num_image_tokens
        if may_hold_images and not is_counted and not input_ids.is_meta:
            counts = images_per_sample(image_mask, self.config.num_image_tokens)
            check_image_count(counts, num_images, per_sample=per_sample)
        if not num_images:
            if self.training and torch.is_grad_enabled():
                # DDP expects a gradient of every parameter on every rank, so the projection takes
                # part in a batch without images too.
                num_patches = self.config.token_merge**2
                blank = inputs_embeds.new_zeros(num_patches, self.config.vision_hidden_size)
                inputs_embeds = inputs_embeds + 0.0 * self.vision_proj(blank).sum()
            return inputs_embeds
        encoded = self.encode_images(
            images, vision_features=vision_features, has_features=has_features
        )
        return fuse_images(inputs_embeds, image_mask, encoded)

    def encode_images(
        self,
        images: Tensor | None,  # (I, 3, S, S)
        *,
        vision_features: Tensor | None = None,
        has_features: Tensor | None = None,
    ) -> Tensor:
        """Images, and features that were computed before, to projected features (I + J, P, D).

        Raises:
            ValueError: no tower for images, features of another shape, or both without
                `has_features`.
        """
        patches = self.patches_of(
            images, vision_features=vision_features, has_features=has_features
        )
        features: Tensor = self.vision_proj(patches)
        return features

    def patches_of(
        self,
        images: Tensor | None,
        *,
        vision_features: Tensor | None = None,
        has_features: Tensor | None = None,
    ) -> Tensor:
        """As `encode_images`, before the projection: (I + J, G * G, V)."""
        weight = next(self.vision_proj.parameters())
        parts = []
        if vision_features is not None:
            num_patches = self.config.num_image_tokens * self.config.token_merge**2
            check_features(vision_features, num_patches, self.config.vision_hidden_size)
            parts.append(vision_features.to(weight.dtype))
        if images is not None:
            parts.append(self._look_at(images).to(weight.dtype))
        patches = parts[0]
        if len(parts) > 1:
            if has_features is None:
                raise ValueError("pixel_values and vision_features together need has_features")
            patches = torch.cat(parts)[_reading_order(has_features, num_features=len(parts[0]))]
        return patches

    def _look_at(self, images: Tensor) -> Tensor:
        if self.vision_encoder is None:
            raise ValueError("this model has no vision tower; call load_vision_encoder(folder)")
        if images.dtype == torch.uint8:
            if self.pixel_steps is None:
                raise ValueError("8-bit pixel_values need the tower's steps; set pixel_steps")
            images = self.pixel_steps.numbers(images)
        return self.get_image_embeddings(
            images,
            self.vision_encoder,
            keep_cls=self.config.keep_cls,
            vision_layer=self.config.vision_layer,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]  # the rest comes by keyword
        self, input_ids: LongTensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Pass the prompt's image mask on wherever the images are passed on, padded to the ids.

        With the mask, generated tokens go on as embeddings: none is taken for a placeholder.
        """
        image_mask = kwargs.pop("image_mask", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        fed = inputs.get("input_ids")
        if image_mask is None or fed is None:
            return inputs
        if inputs.get("pixel_values") is not None:
            generated = fed.shape[1] - image_mask.shape[1]
            inputs["image_mask"] = nn.functional.pad(image_mask, (0, generated))
        elif not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True):
            inputs["inputs_embeds"] = self.model.embed_tokens(inputs.pop("input_ids"))
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]  # never without input_ids
        self, expand_size: int, is_encoder_decoder: bool, input_ids: LongTensor, **kwargs: Any
    ) -> tuple[LongTensor, dict[str, Any]]:
        """For beams and several answers: repeat each sample's images, keeping their order."""
        images, _ = flat_images(kwargs.pop("pixel_values", None), batch_size=len(input_ids))
        if images is not None and expand_size > 1:
            mask = kwargs.get("image_mask")
            if mask is None:
                mask = placeholder_mask(input_ids, self.config.placeholder_ids)
            counts = images_per_sample(mask, self.config.num_image_tokens)
            check_image_count(counts, len(images), per_sample=None)
            images = torch.cat([c.repeat(expand_size, 1, 1, 1) for c in images.split(counts)])
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        if images is not None:
            kwargs["pixel_values"] = images
        return input_ids, kwargs


def _reading_order(has_features: Tensor, *, num_features: int) -> Tensor:
    """Where each image (I + J,) stands in the features followed by the pixel values."""
    with_features = has_features.cumsum(0) - 1
    without = num_features + (~has_features).cumsum(0) - 1
    return torch.where(has_features, with_features, without)
