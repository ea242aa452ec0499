"""Owns batching: pads to the longest sample of the batch and concatenates the images of all.

Shapes: B batch, T tokens (padding included), I images of the whole batch, J more whose features are
given, G patches along a side, V width of the vision tower.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from dataset.lm_dataset import IGNORE_INDEX, BadSample, Sample


@dataclass
class Batch:
    """The model's keyword arguments (`inputs`: tensors, flags, None) and what the loop counts.

    Counts are Python integers: reading one does not synchronise with the device.
    """

    inputs: dict[str, Any]
    num_samples: int  # bad ones included: they are consumed too
    num_sequences: int
    num_supervised: int
    num_tokens: int
    sample_names: list[str]
    bad_samples: list[BadSample] = field(default_factory=list)
    num_truncated: int = 0
    target_sources: Tensor | None = None  # of a mixture, (N,): at `target_positions`
    target_weights: Tensor | None = None  # of each loss, (N,): at `target_positions`

    def pin_memory(self) -> "Batch":
        """What is on the CPU, in place."""
        self.inputs = {
            k: v.pin_memory() if isinstance(v, Tensor) and v.is_cpu else v
            for k, v in self.inputs.items()
        }
        if self.target_sources is not None:
            self.target_sources = self.target_sources.pin_memory()
        if self.target_weights is not None:
            self.target_weights = self.target_weights.pin_memory()
        return self

    def inputs_on(self, device: torch.device) -> dict[str, Any]:
        """The inputs on a device, copied asynchronously only to CUDA: on other devices a tensor
        copied from memory that is not pinned may be read before the copy has ended."""
        is_safe = device.type == "cuda"
        return {
            k: v.to(device, non_blocking=is_safe) if isinstance(v, Tensor) else v
            for k, v in self.inputs.items()
        }


class VLMCollator:
    """Collates samples into a `Batch`, padded on the right; bad samples are listed beside it.

    A batch without a good sample has one row of unsupervised padding: the step runs as usual and
    gives no gradient.

    Args:
        pad_multiple: lengths are padded to a multiple of it, so that a GPU sees few shapes.
        packs: give `packed_positions` too, so that the model leaves the padding out.
        at_side: makes pictures of one size of those of different ones, which then are needed.
    """

    def __init__(
        self,
        *,
        pad_token_id: int,
        pad_multiple: int = 1,
        packs: bool = False,
        at_side: Callable[[Tensor], Tensor] | None = None,
    ):
        self.pad_token_id, self.pad_multiple, self.packs = pad_token_id, pad_multiple, packs
        self.at_side = at_side

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
        if self.packs and good:
            positions = packed_positions(inputs["attention_mask"], multiple=self.pad_multiple)
            inputs["packed_positions"] = positions
        return Batch(
            inputs=inputs,
            num_samples=len(samples),
            num_sequences=len(good),
            num_supervised=sum(int((s.labels[1:] != IGNORE_INDEX).sum()) for s in good),
            num_tokens=sum(len(s.input_ids) for s in good),
            sample_names=[s.where for s in good],
            bad_samples=[s for s in samples if isinstance(s, BadSample)],
            num_truncated=sum(s.is_truncated for s in good),
            target_sources=target_sources(good, inputs),
        )

    def _pad(self, samples: list[Sample]) -> dict[str, Any]:
        def stack(name: str, value: float) -> Tensor:  # (B, T)
            rows = [getattr(s, name) for s in samples]
            padded = pad_sequence(rows, batch_first=True, padding_value=value)
            return pad(padded, (0, -padded.shape[1] % self.pad_multiple), value=value)

        images = self._one_size([s.pixel_values for s in samples])
        input_ids = stack("input_ids", self.pad_token_id)
        lengths = torch.tensor([len(s.input_ids) for s in samples])
        return {
            "input_ids": input_ids,
            "labels": stack("labels", IGNORE_INDEX),
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "image_mask": stack("image_mask", False),
            "pixel_values": images if len(images) else None,
            **collate_features(samples),
        }

    def _one_size(self, pixels: list[Tensor]) -> Tensor:
        """The pictures of all samples: (I, 3, S, S), or (I, 3, H, W) where all are of that size."""
        some = [images for images in pixels if len(images)] or pixels[:1]
        if self.at_side is not None and len({images.shape[2:] for images in some}) > 1:
            some = [self.at_side(images) for images in some]
        return torch.cat(some)


class GroupingCollator:
    """Collates samples into `num_groups` batches of samples of similar length, so that little is
    padded. There are always as many: an empty one is unsupervised padding.

    Args:
        collate: makes a batch.
    """

    def __init__(self, collate: VLMCollator, *, num_groups: int):
        self.collate, self.num_groups = collate, num_groups

    def __call__(self, samples: list[Sample | BadSample]) -> list[Batch]:
        if self.num_groups > 1:
            samples = sorted(samples, key=_num_tokens)  # ties stay in order
        size = -(-len(samples) // self.num_groups)
        starts = range(0, self.num_groups * size, size) if size else [0] * self.num_groups
        return [self.collate(samples[start : start + size]) for start in starts]


def _num_tokens(sample: Sample | BadSample) -> int:
    return len(sample.input_ids) if isinstance(sample, Sample) else 0


def collate_features(samples: list[Sample]) -> dict[str, Any]:
    """The features of a batch, (J, G * G, V), and where some images have none, `has_features`
    (I + J,) bool: which have.

    Returns:
        {} where no image has features.
    """
    given = [s.vision_features for s in samples if s.vision_features is not None]
    if not given:
        return {}
    features = torch.cat(given)
    has_features = [
        flag for s in samples for flag in s.has_features or (False,) * len(s.pixel_values)
    ]
    if all(has_features):
        return {"vision_features": features}
    return {"vision_features": features, "has_features": torch.tensor(has_features)}


def target_sources(samples: list[Sample], inputs: dict[str, Any]) -> Tensor | None:
    """Of a mixture, the number of the source at each of the `target_positions`: (N,) int64."""
    sources = [s.source for s in samples if s.source is not None]
    if not sources:
        return None
    return torch.tensor(sources)[inputs["target_positions"] // inputs["labels"].shape[1]]


def target_positions(labels: Tensor) -> Tensor:
    """Positions in the flattened (B, T) whose next token is supervised: (N,).

    The model computes logits at these only. Found here, on the CPU, they cost no synchronisation
    with the device."""
    is_target = pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    return is_target.flatten().nonzero().flatten()


def packed_positions(attention_mask: Tensor, *, multiple: int = 1) -> Tensor:
    """Positions in the flattened (B, T) that are text, and as much of the padding as makes their
    number a multiple: (N,), ascending."""
    is_packed = attention_mask.flatten().bool()
    num_more = -int(is_packed.sum()) % multiple
    is_packed[(~is_packed).nonzero().flatten()[:num_more]] = True
    return is_packed.nonzero().flatten()
