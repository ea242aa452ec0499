"""Owns what an export starts from: a loaded model's parts, checked to belong together."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import VLMConfig
from model.options import NATIVE
from model.vlm_processor import check_special_tokens, load_tokenizer, tokenizer_sha256
from model.weights.build_model import CONFIG_FLAGS, load_model, read_weight
from model.weights.metadata import METADATA_FORMAT, Metadata, describe_model, read_metadata
from model.weights.strict_loading import (
    PROJECTION_PREFIX,
    VISION_PREFIX,
    load_weights,
)

# Of a weight's description, what follows the model into an export. Its training arguments do not:
# they hold paths of the machine that it was trained on.
KEPT = ("stage", "step")
TEXT_FIELDS = frozenset({*MiniMindConfig.__annotations__, *MiniMindConfig.attribute_map})


@dataclass(frozen=True)
class Vision:
    """What a model sees with: the tower's config and preprocessing."""

    config: PreTrainedConfig
    image_processor: BaseImageProcessor


@dataclass(frozen=True)
class Source:
    """A model to export.

    state: all tensors by our names, the tower's under `vision_encoder.`, float32 on the CPU.
    metadata: what `--to pth` puts beside the weight again.
    vision: None for the language model alone.
    model: what `state` is of; with its tower where there is `vision`.
    """

    path: Path
    config: MiniMindConfig
    state: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    metadata: Metadata
    vision: Vision | None
    model: MiniMindForCausalLM


def load_source(args: argparse.Namespace, *, with_vision: bool) -> Source:
    """Load what the flags name, with its tower or without.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, and what to do.
    """
    if not with_vision and args.load_from == NATIVE:
        return _load_language_model(args)
    loaded = load_model(args)
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    if not loaded.can_see and with_vision:
        raise ValueError(
            f"{loaded.path} is a language model without a projection of images; export it by "
            "--to llama (generation 2) or --to qwen3 (generation 3)"
        )
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if with_vision:
        assert model.vision_encoder is not None and model.image_processor is not None
        vision = Vision(model.vision_encoder.config, model.image_processor)
        metadata = _metadata(model, tokenizer, loaded.path)
        return Source(loaded.path, model.config, state, tokenizer, metadata, vision, model)
    text = MiniMindForCausalLM(text_config(model.config))
    state = text_tensors(state)
    text.load_state_dict(state)
    metadata = _metadata(text, tokenizer, loaded.path)
    return Source(loaded.path, text.config, state, tokenizer, metadata, None, text)


def text_config(config: VLMConfig) -> MiniMindConfig:
    """The config of the language model alone."""
    names = MiniMindConfig.__annotations__.keys() - {"model_type", "rope_parameters"}
    return MiniMindConfig(**{name: getattr(config, name) for name in names})


def _load_language_model(args: argparse.Namespace) -> Source:
    """The language model of a weight: no tower is needed, and a projection is left out."""
    weight = read_weight(args, {name: getattr(args, name) for name in CONFIG_FLAGS})
    path, fields = weight.path, weight.fields
    tokenizer = load_tokenizer(
        args.tokenizer_path,
        expected_sha256=weight.metadata.get("tokenizer_sha256"),
        generation=fields["generation"],
        weight=path,
    )
    check_special_tokens(tokenizer, vocab_size=fields["vocab_size"], model_name=str(path))
    model = MiniMindForCausalLM(
        MiniMindConfig(**{name: value for name, value in fields.items() if name in TEXT_FIELDS})
    )
    load_weights(model, text_tensors(weight.state), path=path, may_lack_projection=True)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    metadata = _metadata(model, tokenizer, path)
    return Source(path, model.config, tensors, tokenizer, metadata, None, model)


def text_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the language model alone."""
    vision = (PROJECTION_PREFIX, VISION_PREFIX)
    return {name: tensor for name, tensor in state.items() if not name.startswith(vision)}


def _metadata(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path
) -> Metadata:
    former: dict[str, Any] = read_metadata(path) if path.is_file() else {}
    described = describe_model(model, tokenizer_sha256=tokenizer_sha256(tokenizer))
    kept = {name: former[name] for name in KEPT if name in former}
    return {"format": METADATA_FORMAT} | described | kept
