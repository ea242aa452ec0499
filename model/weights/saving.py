"""Owns writing a weight: a float16 state dict without the vision tower, and its metadata."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from model.machine.atomic_file import atomic_write, staged_write
from model.weights.metadata import METADATA_FORMAT, Metadata, former_metadata, weight_id
from model.weights.strict_loading import VISION_PREFIX


def half_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as fp16 on the CPU, without the tower; tied ones stay tied.

    Raises:
        ValueError: a tensor does not fit fp16, or is not finite.
    """
    halves: dict[int, Tensor] = {}  # by the address of the original
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(VISION_PREFIX):
            continue
        if tensor.data_ptr() not in halves:
            half = tensor.detach().to("cpu", torch.float16)
            if not half.isfinite().all():
                peak = tensor.detach().float().abs().max().item()
                raise ValueError(
                    f"weight not saved: {name} reaches {peak:.3g}, which fp16 cannot hold (65504 "
                    "at most); training diverged, so go on from an earlier weight with a lower "
                    "--learning_rate"
                )
            halves[tensor.data_ptr()] = half
        state[name] = halves[tensor.data_ptr()]
    return state


def save_weights(model: nn.Module | dict[str, Tensor], path: Path, metadata: Metadata) -> None:
    """Save the fp16 weight and, beside it, its metadata, so that a crash never mixes the two.

    1. Write the weight to a temporary file.
    2. Replace the JSON file; it holds the new metadata and, under `former`, the previous weight's.
    3. Rename the temporary file to the weight's name.

    After a crash between 2 and 3 `read_metadata` finds that the former weight is still there, and
    returns what belongs to it.

    Args:
        model: the model, or its state dict.
        metadata: from `describe_model`, with the stage and its arguments.
    """
    state = half_state(model.state_dict() if isinstance(model, nn.Module) else model)
    former = former_metadata(path) if path.is_file() else None
    with staged_write(path, lambda file: torch.save(state, file)) as temporary:
        full = {"format": METADATA_FORMAT} | metadata | {"weight_id": weight_id(temporary)}
        text = json.dumps(full | {"former": former}, indent=1, ensure_ascii=False)
        atomic_write(path.with_suffix(".json"), lambda file: file.write(text.encode()))
