"""Owns the way back: a folder of a stock class, ours or another's, as a weight of this project."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.export.files import DESCRIPTION
from model.export.names import from_stock
from model.export.stock import TEXT_CLASSES, stock_text_config
from model.machine.atomic_file import real_place
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vlm_processor import load_tokenizer, tokenizer_sha256
from model.weights.build_model import load_model
from model.weights.metadata import METADATA_FORMAT, Metadata, describe_config, describe_model
from model.weights.saving import save_weights
from model.weights.strict_loading import load_weights

# model_type of config.json -> the format, as `names.PREFIXES` has it, and the generation.
READABLE = {
    "llava": ("llava", 2),
    "internvl": ("internvl", 3),
    "llama": ("llama", 2),
    "qwen2_moe": ("llama", 2),
    "qwen3": ("qwen3", 3),
    "qwen3_moe": ("qwen3", 3),
}
# Fields of a stock config that ours has by the same name.
SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "num_experts",
)  # fmt: skip
# What must come out as it was, or the folder computes something that ours does not.
COMPUTED = (
    "head_dim", "hidden_act", "attention_bias", "mlp_bias", "qkv_bias", "use_sliding_window",
    "decoder_sparse_step", "norm_topk_prob",
)  # fmt: skip


def check_new_weight(path: Path) -> None:
    """Raise ValueError where `--to pth` must not write."""
    if path.suffix != ".pth":
        raise ValueError(f"--out {path}: --to pth writes one weight; name it, such as {path}.pth")
    if real_place(path).exists() or path.with_suffix(".json").exists():
        raise ValueError(f"--out {path} is there already; name another file, or remove it first")


def write_pth(args: argparse.Namespace, out: Path) -> None:
    """Write the weight of `--load_from`, with its description beside it.

    Raises:
        FileNotFoundError, ValueError: the folder is none that can be read, or does not fit ours.
    """
    folder = Path(args.load_from)
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type == VLMConfig.model_type:
        loaded = load_model(args)
        sha256 = tokenizer_sha256(loaded.processor.tokenizer)
        described = _read_description(folder)
        found = described or describe_model(loaded.model, tokenizer_sha256=sha256)
        save_weights(loaded.model, out, found)
        return
    if model_type not in READABLE:
        raise ValueError(
            f"{folder}/config.json: model_type {model_type!r} cannot be read here; known are "
            f"{', '.join([VLMConfig.model_type, *READABLE])}"
        )
    model, metadata = _read_stock(folder, *READABLE[model_type])
    save_weights(model, out, metadata)


def _read_stock(
    folder: Path, format_name: str, generation: int
) -> tuple[MiniMindForCausalLM, Metadata]:
    """The model of a stock folder, and what describes it."""
    metadata = _read_description(folder)
    if metadata is not None:
        fields = metadata["config"]
    elif format_name in ("llava", "internvl"):
        raise ValueError(
            f"{folder} has no {DESCRIPTION}, so it was not exported from here, and no weight can "
            "be made of it"
        )
    else:
        fields = _foreign_fields(folder, generation)
    state = from_stock(_read_tensors(folder), format_name, num_rows=fields["vocab_size"])
    is_vlm = format_name in ("llava", "internvl")
    model = (
        MiniMindVLM(VLMConfig(**fields))
        if is_vlm
        else MiniMindForCausalLM(MiniMindConfig(**fields))
    )
    load_weights(model, state, path=folder, may_lack_projection=False)
    if metadata is None:
        metadata = {"config": describe_config(model.config)}
        if (folder / "tokenizer.json").is_file():
            metadata["tokenizer_sha256"] = tokenizer_sha256(load_tokenizer(folder))
    return model, metadata


def _read_description(folder: Path) -> Metadata | None:
    """What an export from here says of its weight; None for another's folder."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    metadata: Metadata = _read_json(path)
    if metadata.get("format") != METADATA_FORMAT or not isinstance(metadata.get("config"), dict):
        raise ValueError(f"{path} is not the description of a weight; export it again")
    return metadata


def _foreign_fields(folder: Path, generation: int) -> dict[str, Any]:
    """Config fields of a language model that another program wrote.

    Raises:
        ValueError: our classes do not compute what its class does.
    """
    path = folder / "config.json"
    theirs = _read_json(path)
    fields = {name: theirs[name] for name in SAME_FIELDS if name in theirs}
    rope = theirs.get("rope_parameters") or theirs
    scaled = theirs.get("rope_scaling") or rope
    kind = scaled.get("rope_type") or scaled.get("type") or "default"
    if kind != "default":
        raise ValueError(f"{path} has rotary positions of the kind {kind}, ours are plain ones")
    fields |= {
        "generation": generation,
        "rope_theta": rope.get("rope_theta", 1e4),
        "use_moe": TEXT_CLASSES[generation, True].lower() == theirs["model_type"].replace("_", ""),
    }
    try:
        ours = stock_text_config(MiniMindConfig(**fields))
    except Exception as error:  # wrong types raise almost anything
        raise ValueError(f"{path} cannot be used ({error})") from error
    for name in COMPUTED:
        wanted = getattr(ours, name, None)
        if theirs.get(name, wanted) not in (wanted, None):
            raise ValueError(f"{path} has {name} {theirs[name]}, but ours is {wanted}")
    return fields


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no {path}; --to pth reads the folder that --load_from names"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; copy or fetch it again")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, or of its `pytorch_model*.bin`."""
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds neither safetensors nor pytorch_model.bin")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            is_safe = path.suffix == ".safetensors"
            tensors |= load_file(path) if is_safe else torch.load(path, weights_only=True)
        except Exception as error:  # safetensors and the unpickler raise almost anything
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}); copy or fetch it again (in a git "
                "clone: git lfs pull)"
            ) from error
    return tensors
