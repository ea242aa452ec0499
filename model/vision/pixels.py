"""Owns a tower's preprocessing in two halves, both of 8-bit pixels until the last step.

A data worker decodes a picture, and resizes and crops it or leaves that to the device; the device
does what is left and turns pixels into the tower's numbers. Both together give the bits of the
library's processor, at a quarter of the memory: a number follows from a pixel's value and channel
alone, so a table of all of them, which the processor itself fills, is all there is to know; and
resizing is a matter of whole numbers (`resampling`).

Shapes: I pictures, H and W a picture's height and width, S the side that the tower takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from model.vision.pictures import Picture, open_image
from model.vision.resampling import FILTERS, Taps, taps, without_wait

NUM_VALUES = 256  # of an 8-bit pixel
WARPED_FROM = 384  # ConvNext's preprocessing crops below this side, and distorts from it on
MAX_SIZES = 64  # of pictures, whose taps are kept on a device
AT_ONCE = 32  # pictures that a device resizes: their sums take 10 MiB each
TRIED_SIZES = ((61, 40), (33, 70), (301, 433))  # wide, tall, and larger than most towers take


@dataclass(frozen=True)
class Geometry:
    """How a picture is resized and cropped.

    size: (height, width), or the length of the shorter side. crop: height and width of the middle
    that is kept; None: all is. resample: one of Pillow's.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    resample: int

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture before the crop."""
        if isinstance(self.size, tuple):
            return self.size
        longer = int(self.size * max(height, width) / min(height, width))
        return (longer, self.size) if width <= height else (self.size, longer)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, bottom and right of the crop of a resized picture."""
        tall, wide = self.crop or (height, width)
        top, left = (height - tall) // 2, (width - wide) // 2
        return top, left, top + tall, left + wide


@dataclass(frozen=True, eq=False)
class PixelSteps:
    """Both halves of one processor's steps; `pixel_steps` makes them.

    side: S. table: (3 * 256,) float32, what the tower is given for each value of each channel.
    keeps_small: leave a picture of fewer pixels than S x S as it is: that is less to do and to
        send, and `numbers` resizes it.
    """

    geometry: Geometry
    side: int
    table: Tensor
    keeps_small: bool = False
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)  # on devices

    def look(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures of any kind as (I, 3, S, S) uint8, or (I, 3, H, W) where all of one size stay
        small; raises as `open_image`."""
        looked = [self.pixels(open_image(picture)) for picture in pictures]
        if len({pixels.shape for pixels in looked}) > 1:
            looked = [self.at_side(pixels[None])[0] for pixels in looked]
        if not looked:
            return torch.zeros(0, 3, self.side, self.side, dtype=torch.uint8)
        return torch.stack(looked)

    def pixels(self, image: Image.Image) -> Tensor:
        """An RGB picture as (3, S, S) uint8, or (3, H, W) where it stays small."""
        is_small = image.width * image.height < self.side**2
        stays = self.keeps_small and is_small and self.geometry.resample in FILTERS
        return _values(image if stays else self._resized(image))

    def at_side(self, pixels: Tensor) -> Tensor:  # (I, 3, H, W) uint8, on the CPU
        """Pictures that stayed small as (I, 3, S, S)."""
        if self._is_done(pixels):
            return pixels
        images = map(Image.fromarray, pixels.permute(0, 2, 3, 1).contiguous().numpy())
        return torch.stack([_values(self._resized(image)) for image in images])

    def numbers(self, pixels: Tensor) -> Tensor:  # (I, 3, H, W) uint8
        """What the tower takes, (I, 3, S, S) float32, on the pixels' device and without a wait."""
        if not self._is_done(pixels):
            pixels = torch.cat([self._resize(some) for some in pixels.split(AT_ONCE)])
        if pixels.device not in self._kept:
            starts = NUM_VALUES * torch.arange(3, dtype=torch.int32)[:, None, None]
            pair = (self.table, starts)
            self._kept[pixels.device] = tuple(without_wait(one, pixels.device) for one in pair)
        table, starts = self._kept[pixels.device]
        numbers: Tensor = table.index_select(0, (pixels + starts).flatten()).view(pixels.shape)
        return numbers

    def _is_done(self, pixels: Tensor) -> bool:
        return pixels.shape[2:] == (self.side, self.side)

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = self.geometry.resized(image.height, image.width)
        image = image.resize((width, height), self.geometry.resample)
        top, left, bottom, right = self.geometry.box(height, width)
        return image.crop((left, top, right, bottom))

    def _resize(self, pixels: Tensor) -> Tensor:
        """As `_resized`, on any device."""
        height, width = self.geometry.resized(*pixels.shape[2:])
        rows, columns = self._taps(pixels, (height, width))
        top, left, bottom, right = self.geometry.box(height, width)
        return rows.along(columns.along(pixels, 3), 2)[..., top:bottom, left:right]

    def _taps(self, pixels: Tensor, target: tuple[int, int]) -> tuple[Taps, Taps]:
        key = (pixels.device, *pixels.shape[2:])
        if key not in self._kept:
            if len(self._kept) > MAX_SIZES:
                self._kept.clear()
            sides = zip(pixels.shape[2:], target, strict=True)
            self._kept[key] = tuple(
                taps(length, wanted, resample=self.geometry.resample).to(pixels.device)
                for length, wanted in sides
            )
        made: tuple[Taps, Taps] = self._kept[key]
        return made


def _values(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def pixel_steps(processor: BaseImageProcessor, *, keeps_small: bool = False) -> PixelSteps | None:
    """The two halves of a processor's steps; None where they would not give its bits.

    That is tried on pictures of noise: steps that are not known here, such as padding, are seen.
    """
    geometry = _geometry(processor)
    if geometry is None:
        return None
    noise = np.random.default_rng(0)
    shapes = [(height, width, 3) for width, height in TRIED_SIZES]
    pictures = [Image.fromarray(noise.integers(0, 256, s, dtype=np.uint8)) for s in shapes]
    try:
        expected = [processor(images=p, return_tensors="pt")["pixel_values"] for p in pictures]
        made = PixelSteps(geometry, expected[0].shape[-1], _table(processor), keeps_small)
        for steps in (made, replace(made, keeps_small=not keeps_small)):
            for picture, numbers in zip(pictures, expected, strict=True):
                if not torch.equal(steps.numbers(steps.look([picture])), numbers):
                    return None
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return None
    return made


def _table(processor: BaseImageProcessor) -> Tensor:
    """(3 * 256,): the processor's number for each value of a channel."""
    values = np.arange(NUM_VALUES, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([values] * 3, axis=-1))
    inputs = processor(images=picture, do_resize=False, do_center_crop=False, return_tensors="pt")
    table: Tensor = inputs["pixel_values"][0].flatten().to(torch.float32)
    return table


def _geometry(processor: BaseImageProcessor) -> Geometry | None:
    """How a processor resizes and crops, by its fields; None where that is of no known kind."""
    steps = processor.to_dict()
    size, crop = steps.get("size") or {}, steps.get("crop_size") or {}
    if not steps.get("do_resize"):
        return None
    resample = int(steps["resample"])
    middle = (crop["height"], crop["width"]) if steps.get("do_center_crop") else None
    if size.keys() == {"height", "width"}:
        return Geometry((size["height"], size["width"]), middle, resample)
    if size.keys() != {"shortest_edge"}:
        return None
    edge = size["shortest_edge"]
    if not isinstance(processor, transformers.ConvNextImageProcessorPil):
        return Geometry(edge, middle, resample)
    if edge < WARPED_FROM:
        return Geometry(int(edge / steps["crop_pct"]), (edge, edge), resample)
    return Geometry((edge, edge), None, resample)
