"""Owns the description beside a weight: what it is, which tower and tokenizer it belongs to."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM

Metadata = dict[str, Any]  # the JSON object beside a weight

METADATA_FORMAT = 1

# Config fields that decide which tensors a model has; a flag must not contradict them.
SIZE_FIELDS = (
    "generation", "projector", "token_merge", "head_dim", "moe_intermediate_size", "hidden_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "use_moe", "n_routed_experts", "n_shared_experts",
    "vision_hidden_size",
)  # fmt: skip
DESCRIBED_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "use_moe", "n_routed_experts", "n_shared_experts",
    "vision_hidden_size", "keep_cls", "image_special_token", "image_ids", "rope_theta",
    "max_position_embeddings", "num_experts_per_tok", "norm_topk_prob", "rms_norm_eps", "dropout",
    "hidden_act", "aux_loss_alpha", "seq_aux",
)  # fmt: skip
# Described only where they differ from what follows from the fields above, as they always did
# before there was a third generation: so descriptions of that time, and states, still compare.
LATER_FIELDS = (
    "generation", "head_dim", "moe_intermediate_size", "image_token_len", "projector",
    "token_merge", "vision_layer", "image_size",
)  # fmt: skip


def weight_id(path: Path) -> str | None:
    """An id of a weight file, from the checksums of its tensors; None if it is not a zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            sums = [(item.filename.partition("/")[2], item.CRC) for item in archive.infolist()]
    except (zipfile.BadZipFile, OSError):
        return None
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def former_metadata(path: Path) -> Metadata:
    """The metadata of the weight that a save is about to replace, with its id."""
    try:
        metadata = read_metadata(path)
    except ValueError:
        metadata = {}
    return metadata | {"weight_id": weight_id(path)}


def describe_config(config: MiniMindConfig) -> dict[str, Any]:
    """The fields of a config that make one like it."""
    fields = {name: getattr(config, name) for name in DESCRIBED_FIELDS if hasattr(config, name)}
    usual = type(config)(**fields)
    for name in LATER_FIELDS:
        if hasattr(config, name) and getattr(config, name) != getattr(usual, name):
            fields[name] = getattr(config, name)
    return fields


def describe_model(model: MiniMindForCausalLM, *, tokenizer_sha256: str) -> Metadata:
    """The metadata that loading checks: sizes, placeholder, tower and tokenizer."""
    tower, tower_name = None, None
    if isinstance(model, MiniMindVLM) and model.vision_encoder is not None:
        tower, tower_name = model.vision_encoder, model.vision_dir.name
    return {
        "config": describe_config(model.config),
        "vision_tower": tower_name,
        "vision_tower_sha256": tower_sha256(tower) if tower is not None else None,
        "tokenizer_sha256": tokenizer_sha256,
    }


def tower_sha256(tower: nn.Module) -> str:
    """A hash of a tower's first and last tensors.

    Of CLIP and SigLIP these are the embeddings and the post-layernorm; of others the embeddings,
    the first tensor, and the last matrix or kernel with all that follows it.
    """
    digest = hashlib.sha256()
    state = tower.state_dict()
    chosen = {name for name in state if "embedding" in name or "post_layernorm" in name}
    if not any("post_layernorm" in name for name in chosen):
        names = list(state)
        last = max(i for i, name in enumerate(names) if state[name].ndim > 1)
        chosen |= {names[0], *names[last:]}
    for name, tensor in state.items():
        if name in chosen:
            digest.update(tensor.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def read_metadata(path: Path) -> Metadata:
    """The metadata of a weight, or {} for one without, such as the original project's.

    A save writes the JSON file before the weight, with the former weight's metadata under
    `former`. If the save was interrupted between the two, the weight still is the former one:
    its id says so, and its own metadata is returned.

    Raises:
        ValueError: the JSON file is damaged, of another format, or of another weight.
    """
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        metadata: Metadata = json.loads(beside.read_text(encoding="utf-8"))
        if isinstance(metadata, dict) and "format" not in metadata:
            return {}  # another program's JSON; the tensors' shapes suffice
        metadata["config"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{beside} is not weight metadata ({error!r}); mend it") from None
    if metadata["format"] != METADATA_FORMAT:
        raise ValueError(f"{beside} has format {metadata.get('format')}, not {METADATA_FORMAT}")
    former: Metadata | None = metadata.pop("former", None)
    expected_id = metadata.get("weight_id")
    found_id = weight_id(path) if former or expected_id else None
    if former and former["weight_id"] == found_id:
        return former if "format" in former else {}
    if expected_id and expected_id != found_id:
        raise ValueError(
            f"{beside} describes another weight than the {path.name} beside it; if that came from "
            f"elsewhere, delete {beside.name}, else put the weight back that belongs to it"
        )
    return metadata
