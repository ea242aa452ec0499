"""Owns the files that all folders have: config, tensors, generation config, description."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from model.export.source import Source

DESCRIPTION = "minimind.json"  # the weight's description, which `--to pth` reads


def save_config(config: PreTrainedConfig, folder: Path, *, dtype: str) -> None:
    """Write config.json, without the path that the tower's was read from."""
    config.dtype = dtype
    fields = json.loads(config.to_json_string(use_diff=False))
    fields.get("vision_config", {}).pop("_name_or_path", None)
    for part in (fields, fields.get("text_config", {})):
        rope = part.get("rope_parameters") or {}
        if "rope_theta" in rope:  # where releases before 5 look for it, and others after them
            part["rope_theta"] = rope["rope_theta"]
            scaled = {name: value for name, value in rope.items() if name != "rope_theta"}
            part["rope_scaling"] = None if rope["rope_type"] == "default" else scaled
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def save_common(
    source: Source,
    tensors: dict[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    never: int | None = None,
) -> None:
    """Write tensors, generation_config.json and the weight's description.

    Args:
        never: a token that must not be generated.
    Raises:
        ValueError: a value does not fit the format.
    """
    path = folder / "model.safetensors"
    path.touch()
    mode = path.stat().st_mode  # safetensors would let the owner alone read it
    save_file(_as_dtype(tensors, dtype), path, {"format": "pt"})
    path.chmod(mode)
    own = source.config
    GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        suppress_tokens=None if never is None else [never],
    ).save_pretrained(folder)
    description = json.dumps(source.metadata, indent=1, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(description, encoding="utf-8")


def _as_dtype(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in another number format, each with memory of its own."""
    cast = {name: tensor.to("cpu", dtype).contiguous().clone() for name, tensor in state.items()}
    for name, tensor in cast.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} does not fit {dtype}; take another --dtype")
    return cast
