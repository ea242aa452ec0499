"""Owns resizing a batch of 8-bit pictures on any device, to the bits that Pillow gives on the CPU.

Pillow resizes rows, then columns; each result is a sum of pixels times whole numbers, rounded and
clipped to 8 bits. Whole numbers give one sum in any order, so that a device agrees. (Of a picture
over a hundred times as tall as wide Pillow resizes columns first; `open_image` refuses these.)

Source: the filters of Pillow's `Image.resize`,
https://pillow.readthedocs.io/en/stable/handbook/concepts.html#filters

Shapes: I pictures, H and W before, L pixels of a side after, K pixels that make one of these.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

FRACTION_BITS = 22  # of a weight: 32 bits without 8 of a pixel, and 2 for the sum
MAX_PIXEL = 255
SLOPE = -0.5  # of Pillow's bicubic filter at a distance of one pixel

Floats = NDArray[np.float64]


def _linear(distance: Floats) -> Floats:
    return np.where(distance < 1, 1 - distance, 0.0)


def _cubic(distance: Floats) -> Floats:
    near = ((SLOPE + 2) * distance - (SLOPE + 3)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * SLOPE
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


# One of Pillow's filters -> how many pixels it reaches, and its weight at a distance.
FILTERS: dict[int, tuple[float, Callable[[Floats], Floats]]] = {
    Image.Resampling.BILINEAR: (1.0, _linear),
    Image.Resampling.BICUBIC: (2.0, _cubic),
}


@dataclass(frozen=True)
class Taps:
    """Of which pixels the results along a side are made: places (L, K) int64, and their weights
    (L, K) int32 in units of 2 ** -`FRACTION_BITS`."""

    places: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "Taps":
        """The same on a device."""
        return Taps(without_wait(self.places, device), without_wait(self.weights, device))

    def along(self, pixels: Tensor, dim: int) -> Tensor:
        """(I, 3, H, W) uint8 with its height (`dim` 2) or width (3) resized."""
        picked = pixels.index_select(dim, self.places.flatten()).unflatten(dim, self.places.shape)
        weights = self.weights[..., None] if dim == 2 else self.weights
        total = (picked * weights).sum(dim + 1, dtype=torch.int32)
        rounded = (total + (1 << (FRACTION_BITS - 1))) >> FRACTION_BITS
        resized: Tensor = rounded.clamp_(0, MAX_PIXEL).byte()
        return resized


def without_wait(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device of what is on the CPU, which a GPU makes while the program goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def taps(length: int, target: int, *, resample: int) -> Taps:
    """The taps that make `target` pixels of `length`; `resample` is a key of `FILTERS`."""
    reach, weigh = FILTERS[resample]
    scale = length / target
    stretch = max(scale, 1.0)
    middle = (np.arange(target) + 0.5) * scale  # of a result, in pixels of before
    first = np.maximum((middle - reach * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((middle + reach * stretch + 0.5).astype(np.int64), length)
    places = first[:, None] + np.arange((last - first).max())  # (L, K)
    distance = np.abs((places - middle[:, None] + 0.5) * (1.0 / stretch))
    weights = np.where(places < last[:, None], weigh(distance), 0.0)
    weights /= weights.cumsum(axis=1)[:, -1:]
    whole = weights * (1 << FRACTION_BITS)
    rounded = np.trunc(whole + np.copysign(0.5, whole)).astype(np.int32)
    return Taps(
        torch.from_numpy(np.minimum(places, length - 1)),
        torch.from_numpy(rounded),
    )
