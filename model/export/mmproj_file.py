"""Owns the GGUF file of a CLIP tower with a linear projection, llama.cpp's `mmproj`.

llama.cpp's graph of the projector type `mlp` reads the hidden state that `feature_layer` names,
leaves out the class token, and computes `mm.2(gelu(mm.0(x)))`. Ours is `mm.0` alone: its bias is
raised by `GELU_SHIFT`, where a GELU changes nothing, and lowered again by the second layer, which
is float32 in every file.

The class token stands first, as CLIP has it. Releases of llama.cpp after its change 13321 put it
last and read the rows as if it were first (issue 25814): they do not see rightly by any CLIP tower.
Source: llama.cpp's tools/mtmd (clip-impl.h: names; models/llava.cpp: the graph).

Shapes: D width of the tower, E hidden of the language model.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from model.export.gguf_file import BLOCK, import_gguf
from model.export.names import GELU_SHIFT, IDENTITY_BIAS, IDENTITY_WEIGHT, PROJECTOR, TOWER
from model.export.source import Source
from model.model_vlm import VLMConfig
from model.vision.preprocessing import measure
from model.vision_tower import image_side
from model.weights.strict_loading import VISION_PREFIX

MMPROJ_FILE = "mmproj.gguf"
OURS = "vision_proj.vision_proj.0."
CLASS_TOKEN = "embeddings.class_embedding"
# llama.cpp reads these by names that the package does not have.
NAMES = {
    f"{TOWER[1]}{CLASS_TOKEN}": "v.class_embd",
    f"{PROJECTOR}linear_1.weight": "mm.0.weight",
    f"{PROJECTOR}linear_1.bias": "mm.0.bias",
    IDENTITY_WEIGHT: "mm.2.weight",
    IDENTITY_BIAS: "mm.2.bias",
}
LAYER = f"{TOWER[1]}encoder.layers."


def write_mmproj(source: Source, folder: Path, *, kind: str) -> str:
    """Write tower and projection.

    Args:
        kind: of the matrices, as of `write_gguf`; where q8_0 does not go into a row, f16.
    Returns:
        What it is, in words.
    Raises:
        ValueError: llama.cpp would compute something else.
    """
    own, vision = source.config, source.vision
    assert isinstance(own, VLMConfig) and vision is not None
    tower = vision.config
    _check_computable(own, tower, path=source.path)
    gguf = import_gguf()
    num_layers = _layers_used(own, tower)
    writer = gguf.GGUFWriter(folder / MMPROJ_FILE, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(source.path.stem)
    _add_sizes(writer, source, num_layers=num_layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, num_layers)
    for name, values in _tensors(source, num_layers=num_layers).items():
        found = NAMES.get(name) or names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        number = gguf.GGMLQuantizationType[_kind_of(found, values, kind).upper()]
        writer.add_tensor(found, gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"mmproj ({kind})"


def _check_computable(own: VLMConfig, tower: PreTrainedConfig, *, path: Path) -> None:
    """Raise ValueError where llama.cpp's graph computes something else."""
    width, inner, activation = (  # a tower of another kind may have none of these
        getattr(tower, name, None) for name in ("hidden_size", "intermediate_size", "hidden_act")
    )
    needed = {
        "projector": (own.projector, "linear"),
        "vision tower": (tower.model_type, "clip_vision_model"),
        "token_merge": (own.token_merge, 1),
        "keep_cls": (own.keep_cls, False),
        "image_size": (own.image_size or image_side(tower), image_side(tower)),
        "hidden_act": (activation in ("quick_gelu", "gelu"), True),
        # Where they are equal llama.cpp takes the two matrices of an MLP for each other.
        "MLP as wide as the tower": (inner == width, False),
    }
    for what, (value, wanted) in needed.items():
        if value != wanted:
            raise ValueError(
                f"{path} has {what} {value!r}, but llama.cpp's mmproj computes {wanted!r}; leave "
                "--mmproj out, or take --to transformers"
            )


def _layers_used(own: VLMConfig, tower: PreTrainedConfig) -> int:
    """How many layers of the tower the projection's input has gone through."""
    num_states = int(tower.num_hidden_layers) + 1
    return num_states - 1 if own.vision_layer is None else own.vision_layer % num_states


def _add_sizes(writer: Any, source: Source, *, num_layers: int) -> None:
    assert source.vision is not None
    tower = source.vision.config
    pixels = measure(source.vision.image_processor, where=str(source.path))
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(image_side(tower))
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_projection_dim(source.config.hidden_size)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_block_count(num_layers)
    writer.add_array("clip.vision.feature_layer", [num_layers])
    std = 1 / (pixels.white - pixels.black)
    writer.add_vision_image_mean((-pixels.black * std).flatten().tolist())
    writer.add_vision_image_std(std.flatten().tolist())
    writer.add_vision_use_gelu(tower.hidden_act == "gelu")


def _tensors(source: Source, *, num_layers: int) -> dict[str, np.ndarray]:
    """The tensors by the hub's names: the tower's up to the layer that is read, no last norm."""
    state = {}
    for name, tensor in source.state.items():
        if name.startswith(VISION_PREFIX):
            state[TOWER[1] + name.removeprefix(VISION_PREFIX)] = tensor
        elif name.startswith(OURS):
            state[f"{PROJECTOR}linear_1.{name.removeprefix(OURS)}"] = tensor
    width = source.config.hidden_size
    state[f"{PROJECTOR}linear_1.bias"] = state[f"{PROJECTOR}linear_1.bias"] + GELU_SHIFT
    state[IDENTITY_WEIGHT], state[IDENTITY_BIAS] = (
        torch.eye(width),
        torch.full((width,), -GELU_SHIFT),
    )
    used = {
        name: tensor.float().numpy()
        for name, tensor in state.items()
        if "post_layernorm" not in name and "position_ids" not in name
    }
    for name in list(used):
        if name.startswith(LAYER) and int(name.removeprefix(LAYER).split(".")[0]) >= num_layers:
            del used[name]
    return used


def _kind_of(name: str, values: np.ndarray, kind: str) -> str:
    """The number format of a tensor: vectors, positions and the second layer stay float32."""
    if values.ndim == 1 or name in ("v.position_embd.weight", NAMES[IDENTITY_WEIGHT]):
        return "f32"
    fits = values.ndim == 2 and values.shape[-1] % BLOCK == 0
    return "f16" if kind == "q8_0" and not fits else kind
