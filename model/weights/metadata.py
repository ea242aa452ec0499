"""Owns the description beside a weight: what it is, which tower and tokenizer it belongs to."""

import hashlib
import json
import zipfile
from pathlib import Path

import torch
from torch import nn

METADATA_FORMAT = 1

# Config fields that decide which tensors a model has; a flag must not contradict them.
SIZE_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "use_moe", "n_routed_experts", "n_shared_experts",
    "vision_hidden_size",
)  # fmt: skip


def weight_id(path: Path) -> str | None:
    """Tells weight files apart by the checksums of their tensors; None for what is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            sums = [(item.filename.partition("/")[2], item.CRC) for item in archive.infolist()]
    except (zipfile.BadZipFile, OSError):
        return None
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def former_metadata(path: Path) -> dict:
    """What is known of the weight that a save replaces, with its id."""
    try:
        metadata = read_metadata(path)
    except ValueError:
        metadata = {}
    return metadata | {"weight_id": weight_id(path)}


def describe_model(model, *, tokenizer_sha256: str) -> dict:
    """The metadata that loading checks: sizes, placeholder, tower and tokenizer."""
    config = model.config
    names = (*SIZE_FIELDS, "keep_cls", "image_special_token", "image_ids", "rope_theta",
             "max_position_embeddings", "num_experts_per_tok", "norm_topk_prob",
             "rms_norm_eps", "dropout", "hidden_act", "aux_loss_alpha", "seq_aux")  # fmt: skip
    tower = getattr(model, "vision_encoder", None)
    return {
        "config": {name: getattr(config, name) for name in names if hasattr(config, name)},
        "vision_tower": model.vision_dir.name if tower is not None else None,
        "vision_tower_sha256": tower_sha256(tower) if tower is not None else None,
        "tokenizer_sha256": tokenizer_sha256,
    }


def tower_sha256(tower: nn.Module) -> str:
    """Tells towers apart by the tensors at their two ends."""
    digest = hashlib.sha256()
    for name, tensor in tower.state_dict().items():
        if "embedding" in name or "post_layernorm" in name:
            digest.update(tensor.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def read_metadata(path: Path) -> dict:
    """What lies beside a weight, or {} for a plain published file."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        metadata = json.loads(beside.read_text(encoding="utf-8"))
        if isinstance(metadata, dict) and "format" not in metadata:
            return {}  # somebody else's JSON; the tensors' shapes are enough
        metadata["config"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{beside} is not weight metadata ({error!r}); mend it") from None
    if metadata["format"] != METADATA_FORMAT:
        raise ValueError(f"{beside} has format {metadata.get('format')}, not {METADATA_FORMAT}")
    former, described = metadata.pop("former", None), metadata.get("weight_id")
    found = weight_id(path) if former or described else None
    if former and former["weight_id"] == found:
        return former if "format" in former else {}  # a save was cut off before the weight
    if described and described != found:
        raise ValueError(
            f"{beside} describes another weight than the {path.name} beside it; if that came from "
            f"elsewhere, delete {beside.name}, else put the weight back that belongs to it"
        )
    return metadata
