"""Owns the frozen vision tower: its folder, kind, shape, weights and features.

A tower is any of `KINDS`, read from a folder by its own config.

Shapes: I images, S image side in pixels, G patches along a side, R prefix tokens (CLS and
registers), V width of the tower, P image tokens.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging as hf_logging

from model.generations import DEFAULT_GENERATION, GENERATIONS
from model.vision.kinds import KINDS, TowerKind
from model.vision.preprocessing import (
    at_side,
    default_image_processor,
    first_line,
    measure,
    read_image_processor,
)

VISION_DIR = Path(__file__).resolve().parent / "vision_model"
DEFAULT_SIDE = 224  # of a tower whose files name none, such as a bare ResNet
NEVER_READ = ("mask_token", "num_batches_tracked")  # tensors that inference does not use


FULL_MODELS = {"clip": "CLIPConfig", "siglip": "SiglipConfig"}  # with a text tower beside
WHOLE_MODEL = "minimind-v"  # an export, whose tensors of the tower begin with `vision_encoder.`
NAFLEX = ("siglip2", "siglip2_vision_model")


@dataclass(frozen=True)
class TowerShape:
    """What a tower makes of a picture of `side` pixels: `num_prefix` tokens, then `grid` x `grid`
    patches row by row, each `width` wide."""

    model_type: str
    side: int
    grid: int
    num_prefix: int
    width: int


def find_vision_dir(
    vision_model_path: str | Path | None = None,
    *,
    named: str | None = None,
    generation: int = DEFAULT_GENERATION,
) -> Path:
    """The folder of the tower: the given one, else the default places of the generation.

    Args:
        named: the folder's name that a weight was trained with.
    Raises:
        FileNotFoundError: no `config.json` there; says what to do.
    """
    default = GENERATIONS[generation].vision_dir
    if vision_model_path:
        candidates = [Path(vision_model_path)]
    else:
        name = Path(named).name if named else default.name
        candidates = [default.parent / name, VISION_DIR / name, default]
        candidates += [VISION_DIR] if default.parent == VISION_DIR else []
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"no vision tower: {' nor '.join(dict.fromkeys(map(str, candidates)))} holds a config.json;"
        f" fetch it by `python dataset/download.py {GENERATIONS[generation].vision}`, or name "
        "another folder by --vision_model_path"
    )


def load_vision_config(folder: Path) -> PreTrainedConfig:
    """The tower's config, from its own folder or from that of a model it is a part of.

    Raises:
        ValueError: it cannot be read, or it is no tower known here.
    """
    try:
        model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        if model_type in FULL_MODELS:
            full = getattr(transformers, FULL_MODELS[model_type]).from_pretrained(folder)
            config: PreTrainedConfig = full.vision_config
        elif model_type == WHOLE_MODEL and has_own_tower(folder):
            fields = PreTrainedConfig.get_config_dict(folder)[0]["vision_config"]
            model_type = fields.pop("model_type")
            config = KINDS[model_type].config_class(**fields)
        elif model_type in KINDS:
            config = KINDS[model_type].config_class.from_pretrained(folder)
    except Exception as error:  # wrong fields raise almost anything
        raise ValueError(
            f"{folder}/config.json cannot be read ({first_line(error)}); fetch the folder again"
        ) from error
    if model_type in NAFLEX:
        raise ValueError(
            f"{folder}/config.json: model_type {model_type!r} is a SigLIP2 of variable resolution "
            "(NaFlex), which is not supported; use one of fixed resolution, such as "
            "google/siglip2-base-patch32-256"
        )
    if model_type not in KINDS and model_type not in FULL_MODELS:
        raise ValueError(f"{folder}/config.json: {_unknown(model_type)}")
    if config.num_channels != 3:
        raise ValueError(
            f"{folder}/config.json: this tower takes {config.num_channels} channels, but pictures "
            "have 3; use a tower for RGB pictures"
        )
    for name, value in kind_of(config).config_fields.items():
        setattr(config, name, value)
    return config


def has_own_tower(folder: Path) -> bool:
    """Whether a folder of a whole MiniMind-V, as an export writes it, holds the tower too."""
    fields = PreTrainedConfig.get_config_dict(folder)[0].get("vision_config")
    return isinstance(fields, dict) and fields.get("model_type") in KINDS


def kind_of(config: PreTrainedConfig) -> TowerKind:
    """The kind of a tower, by its config; ValueError if it is unknown."""
    if config.model_type not in KINDS:
        raise ValueError(_unknown(config.model_type))
    return KINDS[config.model_type]


def _unknown(model_type: str | None) -> str:
    return (
        f"model_type {model_type!r} is no vision tower known here; known are "
        f"{', '.join([*FULL_MODELS, *KINDS])}"
    )


def image_side(config: PreTrainedConfig) -> int:
    """S by the config: the only one that fits, or the one that the tower was pretrained with."""
    return _one(getattr(config, "image_size", None) or DEFAULT_SIDE, "image_size")


def _one(value: Any, name: str) -> int:
    """A length that a config gives as a number or as a pair of equal ones."""
    pair = list(value) if isinstance(value, list | tuple) else [value]
    if len(set(pair)) != 1:
        raise ValueError(f"config.json: {name} {value} is not square; use a tower of squares")
    return int(pair[0])


def load_image_processor(
    folder: Path, config: PreTrainedConfig, *, image_size: int | None = None
) -> BaseImageProcessor:
    """The folder's preprocessing; without a file of it, the kind's usual one at the config's side.

    Args:
        image_size: the side to make pictures of, in place of the folder's.
    Raises:
        ValueError: the file is damaged, or of another tower, or the side does not suit the tower.
    """
    kind, side = kind_of(config), image_side(config)
    processor = read_image_processor(folder, default=kind.processor)
    if processor is None:
        processor = default_image_processor(kind.processor, side, is_imagenet=kind.is_imagenet)
    found = measure(processor, where=str(folder)).side
    if image_size is not None:
        _check_image_size(image_size, config)
        return at_side(processor, image_size, found=found)
    if found != side and not kind.takes_any_side:
        raise ValueError(
            f"{folder}: preprocessor_config.json makes pictures of {found}x{found} but the tower "
            f"takes {side}x{side}; the two files belong to different towers"
        )
    return processor


def _check_image_size(image_size: int, config: PreTrainedConfig) -> None:
    """Raise ValueError for a side that no whole number of patches fills."""
    patch = _one(getattr(config, "patch_size", 1), "patch_size")
    if image_size < patch or image_size % patch:
        near = max(1, round(image_size / patch)) * patch
        raise ValueError(
            f"--image_size {image_size} is no multiple of this tower's patches of {patch} pixels; "
            f"take {near}"
        )


def read_tower_shape(
    folder: Path, *, vision_layer: int | None = None, image_size: int | None = None
) -> TowerShape:
    """The shape of a folder's tower, by its config and preprocessing; no weights are read."""
    config = load_vision_config(folder)
    processor = load_image_processor(folder, config, image_size=image_size)
    side = measure(processor, where=str(folder)).side
    return tower_shape(config, side=side, vision_layer=vision_layer)


def tower_shape(
    config: PreTrainedConfig, *, side: int, vision_layer: int | None = None
) -> TowerShape:
    """The shape of the tower of a config for pictures of `side` pixels.

    Raises:
        ValueError: it has no such layer.
    """
    num_prefix = kind_of(config).num_prefix
    if num_prefix is None:
        return _map_shape(config.model_type, config.to_json_string(), side, vision_layer)
    if vision_layer is not None:
        _check_layer(vision_layer, config.num_hidden_layers + 1, config.model_type)
    grid = side // _one(config.patch_size, "patch_size")
    return TowerShape(config.model_type, side, grid, num_prefix(config), config.hidden_size)


@lru_cache(maxsize=32)
def _map_shape(
    model_type: str, config_json: str, side: int, vision_layer: int | None
) -> TowerShape:
    """The shape of a feature map, by a forward pass on the meta device."""
    kind = KINDS[model_type]
    with torch.device("meta"):
        tower = kind.model_class(kind.config_class.from_dict(json.loads(config_json))).eval()
        states = _states(tower, torch.empty(1, 3, side, side), vision_layer)
    _, width, grid, _ = states.shape
    return TowerShape(model_type, side, grid, 0, width)


def _check_layer(vision_layer: int, num_states: int, model_type: str) -> None:
    if not -num_states <= vision_layer < num_states:
        raise ValueError(
            f"--vision_layer {vision_layer}: this {model_type} tower has hidden states 0 to "
            f"{num_states - 1}, or {-num_states} to -1 from the end"
        )


def _check_prefix(keep_cls: bool, num_prefix: int, model_type: str) -> None:
    if keep_cls and not num_prefix:
        raise ValueError(
            f"--keep_cls 1: a {model_type} tower has no CLS token to keep; take --keep_cls 0"
        )


def count_prefix_tokens(config: PreTrainedConfig) -> int:
    """R: the CLS token and the registers in front of the patches; 0 where there are none."""
    num_prefix = kind_of(config).num_prefix
    return num_prefix(config) if num_prefix is not None else 0


def count_image_tokens(shape: TowerShape, *, keep_cls: bool, token_merge: int = 1) -> int:
    """P of a tower.

    Args:
        keep_cls: the prefix tokens stay in front: the CLS token and, where the tower has them,
            its registers.
        token_merge: m; m x m patches become one token.
    Raises:
        ValueError: there is no prefix to keep, or m does not divide the grid's side.
    """
    _check_prefix(keep_cls, shape.num_prefix, shape.model_type)
    grid = shape.grid
    if token_merge < 1 or grid % token_merge:
        divisors = [m for m in range(1, grid + 1) if grid % m == 0]
        raise ValueError(
            f"--token_merge {token_merge} does not divide the {grid}x{grid} grid of patches that "
            f"this {shape.model_type} tower gives; take {', '.join(map(str, divisors))}"
        )
    return int((grid // token_merge) ** 2) + (shape.num_prefix if keep_cls else 0)


def tower_features(
    tower: PreTrainedModel,
    pixel_values: Tensor,  # (I, 3, S, S)
    *,
    keep_cls: bool,
    vision_layer: int | None = None,
) -> Tensor:
    """What a tower says of each patch, without gradient.

    Args:
        keep_cls: leave the CLS token, and the registers after it, in front. A SigLIP and a feature
            map have none.
        vision_layer: which of the hidden states; None means the library's `last_hidden_state` (of
            CLIP before its last norm, of SigLIP, ViT and DINO after it).
    Returns:
        (I, G * G, V), the patches row by row; with `keep_cls` (I, R + G * G, V).
    """
    num_prefix = count_prefix_tokens(tower.config)
    _check_prefix(keep_cls, num_prefix, tower.config.model_type)
    with torch.no_grad():
        states = _states(tower, pixel_values.to(tower.dtype), vision_layer)
    if states.ndim == 4:
        return states.flatten(2).transpose(1, 2)  # (I, V, G, G) -> (I, G * G, V)
    return states if keep_cls or not num_prefix else states[:, num_prefix:]


def _states(tower: PreTrainedModel, pixel_values: Tensor, vision_layer: int | None) -> Tensor:
    # At another side than the tower's own, its learnt positions are interpolated.
    is_fixed = not kind_of(tower.config).takes_any_side
    is_own_side = pixel_values.shape[-1] == image_side(tower.config)
    options = {"interpolate_pos_encoding": True} if is_fixed and not is_own_side else {}
    if vision_layer is None:
        last: Tensor = tower(pixel_values, **options).last_hidden_state
        return last
    states = tower(pixel_values, output_hidden_states=True, **options).hidden_states
    _check_layer(vision_layer, len(states), tower.config.model_type)
    chosen: Tensor = states[vision_layer]
    return chosen


def load_vision_tower(folder: Path) -> PreTrainedModel:
    """The frozen tower in float32 and eval mode; every one of its tensors must be in the file.

    Raises:
        ValueError: the weights are damaged or of another tower.
    """
    config = load_vision_config(folder)
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # in a full CLIP folder the text tower counts as unexpected
    progress_bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        tower, report = _read_tower(folder, config)
    except Exception as error:  # safetensors and the unpickler raise almost anything
        raise ValueError(
            f"{folder}: the tower's weights cannot be read ({first_line(error)}); fetch the folder "
            "again (a clone may need `git lfs pull`)"
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
        if progress_bar:
            hf_logging.enable_progress_bar()
    missing = [name for name in report["missing_keys"] if not name.endswith(NEVER_READ)]
    lost = sorted([*missing, *(str(k) for k in report["mismatched_keys"])])
    if lost:
        raise ValueError(
            f"{folder}: {len(lost)} tensors of the vision tower are missing or of another size, "
            f"such as {lost[0]}; fetch the folder again"
        )
    tower.eval().requires_grad_(False)
    return tower


def _read_tower(
    folder: Path, config: PreTrainedConfig
) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """The model, and which tensors transformers reports as missing, unexpected or mismatched."""
    kind = kind_of(config)
    loaded: tuple[PreTrainedModel, dict[str, set[str]]] = kind.model_class.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        key_mapping={r"^vision_encoder\.": ""},
        **kind.options,
    )  # type: ignore[assignment]  # annotated as the model alone
    return loaded
