"""Owns reading a weight: its tensors, the sizes they imply, and loading them strictly.

A weight never holds the vision tower; any other tensor that is missing, unknown or of another shape
is an error.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.weights.metadata import SIZE_FIELDS, read_metadata

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

VISION_PREFIX = "vision_encoder."
PROJECTION_PREFIX = "vision_proj."
PROJECTION_LAYERS = {  # projector -> the layer that takes the patches
    "linear": "vision_proj.vision_proj.0.weight",
    "mlp": "vision_proj.mlp.1.weight",
}
# Of a described projection, what no tensor's shape tells, and what it is where not described.
UNSAID = {"token_merge": 1, "vision_layer": None, "image_size": None}

# The first release (2024) called its tensors tok_embeddings, attention.wq, feed_forward.w1, ...
FIRST_RELEASE_KEY = re.compile(r"tok_embeddings|attention\.w[qkvo]|feed_forward\.w\d")
TRAINING_STATE_KEYS = {"model", "optimizer"}


def read_weights(path: Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """The state dict of a weight file, without a vision tower.

    With `shapes_only` the tensors have no values (they are on `meta`).

    Raises:
        ValueError: unreadable, of the first release, or a training state.
    """
    try:
        state = torch.load(path, map_location="meta" if shapes_only else "cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # the unpickler raises almost anything on damaged data
        raise ValueError(
            f"{path} is not a readable weight file ({type(error).__name__}); copy or fetch it again"
        ) from error
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} is not a state dict of tensors")
    if TRAINING_STATE_KEYS <= state.keys():
        raise ValueError(
            f"{path} is a training state, not a weight; use the weight saved beside it in out/, "
            "or resume by --from_resume 1"
        )
    if any(FIRST_RELEASE_KEY.search(str(key)) for key in state):
        raise ValueError(
            f"{path} comes from the first release (2024), whose tensors are named otherwise; it "
            "cannot be loaded here: use the weights published since then"
        )
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds more than tensors, so it is not a weight file")
    return {k: v for k, v in state.items() if not k.startswith(VISION_PREFIX)}


def is_third_generation(names: Iterable[str]) -> bool:
    """Whether a weight's tensors are those of generation 3: it alone has norms of the queries."""
    return any(name.endswith(".self_attn.q_norm.weight") for name in names)


def sizes_from_tensors(
    state: dict[str, Tensor], *, path: Path, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The generation and the sizes of a model, read off its tensors' names and shapes.

    Args:
        known: config fields that no shape depends on: `num_attention_heads` and `head_dim` in
            generation 2, `token_merge`.
    """
    known = known or {}
    is_third, layer = is_third_generation(state), "model.layers.0."
    try:
        vocab_size, hidden_size = state[EMBEDDING].shape
        num_layers = 1 + max(
            int(m[1]) for k in state if (m := re.match(r"model\.layers\.(\d+)\.", k))
        )
        q_dim, kv_dim = (
            state[f"{layer}self_attn.{name}_proj.weight"].shape[0] for name in ("q", "k")
        )
        if is_third:
            head_dim = state[f"{layer}self_attn.q_norm.weight"].shape[0]
        else:
            head_dim = known.get("head_dim") or q_dim // (known.get("num_attention_heads") or 8)
        up_projections = [k for k in state if re.match(r"model\.layers\.0\.mlp\..*up_proj", k)]
        experts = [k for k in up_projections if ".experts." in k]
        shared = [k for k in up_projections if ".shared_experts." in k]
        width = state[f"{layer}mlp.{'experts.0.' if experts else ''}up_proj.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a MiniMind weight: {error} is not among its {len(state)} tensors"
        ) from None
    sizes = {
        "generation": 3 if is_third else 2,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": q_dim // head_dim,
        "num_key_value_heads": kv_dim // head_dim,
        "use_moe": bool(experts),
    }
    if head_dim * sizes["num_attention_heads"] != hidden_size:
        sizes["head_dim"] = head_dim
    if not (experts and known.get("moe_intermediate_size")):
        sizes["intermediate_size"] = width
    if experts:
        sizes |= {"n_routed_experts": len(experts), "n_shared_experts": len(shared)}
    return sizes | _projection_sizes(state, known)


def _projection_sizes(state: dict[str, Tensor], known: dict[str, Any]) -> dict[str, Any]:
    """What the projection's tensors tell; {} for a language model without one."""
    for projector, name in PROJECTION_LAYERS.items():
        if name in state:
            width = state[name].shape[1] // (known.get("token_merge") or 1) ** 2
            return {"projector": projector, "vision_hidden_size": width}
    return {}


def weight_config(state: dict[str, Tensor], *, path: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Config fields of a weight: from its metadata, else its shapes, else the flags.

    Args:
        flags: config fields that the user gave; None where not given.
    Raises:
        ValueError: a flag, or the metadata, contradicts the tensors.
    """
    config: dict[str, Any] = read_metadata(path).get("config", {})
    given = {name: value for name, value in flags.items() if value is not None}
    for name, usual in UNSAID.items() if "vision_hidden_size" in config else ():
        found = config.get(name, usual)
        if given.get(name, found) != found:
            raise ValueError(_contradicts(path, name, found, given[name]))
    sizes = sizes_from_tensors(state, path=path, known=given | config)
    for name, size in sizes.items():
        if name in config and config[name] != size:
            raise ValueError(
                f"{path.with_suffix('.json')} says {name} {config[name]} but the tensors of "
                f"{path.name} say {size}: the two files do not belong together"
            )
    config = config | sizes
    for name, wanted in given.items():
        if name in SIZE_FIELDS and name in config and config[name] != wanted:
            raise ValueError(_contradicts(path, name, config[name], wanted))
    return config | given


def _contradicts(path: Path, name: str, found: Any, wanted: Any) -> str:
    return (
        f"{path} has {name} {found}, not {wanted} as the flags say; leave the flag out, or choose "
        "another weight"
    )


def load_weights(
    model: nn.Module, state: dict[str, Tensor], *, path: Path, may_lack_projection: bool
) -> bool:
    """Copy a state dict into a model, strictly.

    Args:
        may_lack_projection: accept a language model without `vision_proj.*`.
    Returns:
        Whether the weight had a projection.
    Raises:
        ValueError: naming the tensors that are missing, left over, misshapen or untied.
    """
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(VISION_PREFIX)}
    has_projection = check_tensors(own, state, path=path, may_lack_projection=may_lack_projection)
    infinite = [k for k in state if not state[k].isfinite().all()]
    _refuse(path, "has values that are not finite in", infinite)
    if {EMBEDDING, HEAD} <= state.keys() and not torch.equal(state[EMBEDDING], state[HEAD]):
        raise ValueError(f"{path}: {HEAD} differs from {EMBEDDING}, but here they are one tensor")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return has_projection


def check_tensors(
    own: dict[str, Tensor], state: dict[str, Tensor], *, path: Path, may_lack_projection: bool
) -> bool:
    """Names and shapes only; returns and raises as `load_weights` does."""
    has_projection = any(k.startswith(PROJECTION_PREFIX) for k in state)
    missing = [k for k in own if k not in state and k != HEAD]
    if may_lack_projection and not has_projection:
        missing = [k for k in missing if not k.startswith(PROJECTION_PREFIX)]
    _refuse(path, "lacks", missing)
    _refuse(path, "has unknown", [k for k in state if k not in own])
    _refuse(path, "has another size of", [k for k in state if state[k].shape != own[k].shape])
    return has_projection


def _refuse(path: Path, problem: str, names: list[str]) -> None:
    if names:
        raise ValueError(
            f"{path} {problem} {len(names)} tensor(s): {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}; it is not a weight of this model"
        )
