"""Owns the tensor names of the stock formats, both ways, and the tensors that differ in value.

Names are those of the hub's checkpoints, which every release of transformers and vLLM reads.

Shapes: D hidden, V vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from model.weights.strict_loading import EMBEDDING, HEAD

PROJECTOR = "multi_modal_projector."
TEXT, LM_HEAD = ("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")
TOWER = ("vision_encoder.", "vision_tower.vision_model.")
# Format -> our prefix and its own.
PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "llama": (),
    "qwen3": (),
    "llava": (TEXT, LM_HEAD, TOWER, ("vision_proj.vision_proj.0.", f"{PROJECTOR}linear_1.")),
    "internvl": (
        TEXT,
        LM_HEAD,
        TOWER,
        ("vision_proj.mlp.0.", f"{PROJECTOR}layer_norm."),
        ("vision_proj.mlp.1.", f"{PROJECTOR}linear_1."),
        ("vision_proj.mlp.3.", f"{PROJECTOR}linear_2."),
    ),
}
# Qwen2-MoE weighs its shared expert by sigmoid(gate): a gate of 0 and twice the output is one.
SHARED, STOCK_SHARED = ".mlp.shared_experts.0.", ".mlp.shared_expert."
SHARED_GATE = ".mlp.shared_expert_gate.weight"
SHARED_DOWN = f"{STOCK_SHARED}down_proj.weight"
# LLaVA's second layer, which ours lacks.
IDENTITY_WEIGHT, IDENTITY_BIAS = f"{PROJECTOR}linear_2.weight", f"{PROJECTOR}linear_2.bias"
# GELU(x + 512) - 512 is x, within 6e-5 in float32, wherever x > -500; a trained projector's
# features reach -170.
GELU_SHIFT = 512.0


def to_stock(
    state: dict[str, Tensor],
    format_name: str,
    *,
    num_rows: int | None = None,
    with_gelu: bool = False,
) -> dict[str, Tensor]:
    """Our tensors as those of a stock format, without the head, which is tied to the embedding.

    Args:
        num_rows: V there; further rows of the embedding are 0.
        with_gelu: LLaVA's projector is to be exact (in float32) around a GELU too.
    """
    stock = {}
    for name, tensor in state.items():
        if name != HEAD:
            stock[_renamed(name, PREFIXES[format_name]).replace(SHARED, STOCK_SHARED)] = tensor
    for name in [n for n in stock if n.endswith(SHARED_DOWN)]:
        stock[name] = 2 * stock[name]
        width = stock[name].shape[0]
        stock[name.replace(SHARED_DOWN, SHARED_GATE)] = stock[name].new_zeros(1, width)
    embedding = _renamed(EMBEDDING, PREFIXES[format_name])
    missing = (num_rows or 0) - len(stock[embedding])
    if missing > 0:
        rows = stock[embedding].new_zeros(missing, stock[embedding].shape[1])
        stock[embedding] = torch.cat((stock[embedding], rows))
    if format_name == "llava":
        bias = stock[f"{PROJECTOR}linear_1.bias"]
        shift = GELU_SHIFT if with_gelu else 0.0
        stock[f"{PROJECTOR}linear_1.bias"] = bias + shift
        stock[IDENTITY_WEIGHT] = torch.eye(len(bias))
        stock[IDENTITY_BIAS] = torch.full_like(bias, -shift)
    return stock


def from_stock(
    stock: dict[str, Tensor], format_name: str, *, num_rows: int | None = None
) -> dict[str, Tensor]:
    """The inverse of `to_stock`, without the tower; a name that is unknown stays as it is.

    Args:
        num_rows: V here.
    Raises:
        ValueError: the projector has a second layer of its own.
    """
    stock = dict(stock)
    if format_name == "llava" and IDENTITY_WEIGHT in stock:
        second, bias = stock.pop(IDENTITY_WEIGHT), stock.pop(IDENTITY_BIAS)
        if not torch.equal(second, torch.eye(len(second)).to(second)):
            raise ValueError("its projector has two layers, ours has one: no weight can be made")
        stock[f"{PROJECTOR}linear_1.bias"] = stock[f"{PROJECTOR}linear_1.bias"] + bias
    backwards = [(stock_prefix, own) for own, stock_prefix in PREFIXES[format_name]]
    state = {}
    for name, tensor in stock.items():
        own = _renamed(name, backwards).replace(STOCK_SHARED, SHARED)
        if own.endswith(SHARED_GATE) and tensor.any():
            raise ValueError(f"{name} is not 0: it weighs a shared expert, and ours have no weight")
        if own.startswith(TOWER[0]) or own.endswith(SHARED_GATE):
            continue
        state[own] = tensor / 2 if name.endswith(SHARED_DOWN) else tensor
    for name in {EMBEDDING, HEAD} & state.keys():
        state[name] = state[name][:num_rows]
    return state


def _renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
