"""Owns batching: padding to the batch's own longest sample, and images of all samples in a row.

Shapes: B batch, T tokens (padding included), I images of the whole batch, S image side.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from dataset.lm_dataset import IGNORE_INDEX, BadSample, Sample


@dataclass
class Batch:
    """What the model takes (`inputs`) and what the loop counts; counts are plain integers, so
    that reading them never waits for the device."""

    inputs: dict[str, Tensor]
    num_samples: int  # bad ones included: they are consumed too
    num_sequences: int
    num_supervised: int
    num_tokens: int
    sample_names: list[str]
    bad_samples: list[BadSample] = field(default_factory=list)
    num_truncated: int = 0

    def pin_memory(self) -> "Batch":
        self.inputs = {
            k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in self.inputs.items()
        }
        return self

    def inputs_on(self, device: torch.device) -> dict[str, Tensor]:
        """The model's inputs on a device, copied without waiting where that is safe: to CUDA
        devices. To others a copy from memory that is not pinned may be read before it is whole."""
        is_safe = device.type == "cuda"
        return {
            k: v.to(device, non_blocking=is_safe) if isinstance(v, Tensor) else v
            for k, v in self.inputs.items()
        }


class VLMCollator:
    """Samples to a `Batch`; padding stands behind the text, bad samples are set aside.

    A batch without one good sample still has a row, of a single unsupervised padding token: the
    step runs as usual and learns nothing from it.

    Args:
        pad_multiple: lengths are padded up to a multiple of it, so that a GPU meets few shapes.
    """

    def __init__(self, *, pad_token_id: int, pad_multiple: int = 1):
        self.pad_token_id, self.pad_multiple = pad_token_id, pad_multiple

    def __call__(self, samples: list[Sample | BadSample]) -> Batch:
        good = [s for s in samples if isinstance(s, Sample)]
        if good:
            inputs = self._pad(good)
        else:
            blank = torch.full((1, self.pad_multiple), self.pad_token_id)
            inputs = {
                "input_ids": blank,
                "labels": torch.full_like(blank, IGNORE_INDEX),
                "attention_mask": torch.zeros_like(blank),
                "image_mask": torch.zeros_like(blank, dtype=torch.bool),
                "pixel_values": None,
            }
        inputs["is_right_padded"] = True
        inputs["target_positions"] = target_positions(inputs["labels"])
        return Batch(
            inputs=inputs,
            num_samples=len(samples),
            num_sequences=len(good),
            num_supervised=sum(int((s.labels[1:] != IGNORE_INDEX).sum()) for s in good),
            num_tokens=sum(len(s.input_ids) for s in good),
            sample_names=[s.where for s in good],
            bad_samples=[s for s in samples if isinstance(s, BadSample)],
            num_truncated=sum(s.is_truncated for s in good),
        )

    def _pad(self, samples: list[Sample]) -> dict[str, Tensor | None]:
        def stack(name: str, value) -> Tensor:  # (B, T)
            rows = [getattr(s, name) for s in samples]
            padded = pad_sequence(rows, batch_first=True, padding_value=value)
            return pad(padded, (0, -padded.shape[1] % self.pad_multiple), value=value)

        images = torch.cat([s.pixel_values for s in samples])
        input_ids = stack("input_ids", self.pad_token_id)
        lengths = torch.tensor([len(s.input_ids) for s in samples])
        return {
            "input_ids": input_ids,
            "labels": stack("labels", IGNORE_INDEX),
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "image_mask": stack("image_mask", False),
            "pixel_values": images if len(images) else None,
        }


def target_positions(labels: Tensor) -> Tensor:
    """Where, in the flattened (B, T), the next token is supervised: (N,). Counted here, on the
    CPU, so that the model computes logits only there without asking its device how many."""
    is_target = pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    return is_target.flatten().nonzero().flatten()
