"""Owns how a picture becomes the pixels of a tower: the folder's own preprocessing, or a default.

PIL and NumPy alone; torchvision is not needed.

Shapes: S image side in pixels.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# What `preprocessor_config.json` may name -> the library's class of the same steps in PIL.
# DINOv3's own exists for torchvision alone. It rescales before it resizes; ViT's resizes the 8-bit
# picture, so a pixel differs by the rounding to 1/255.
PIL_CLASSES = {
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "SiglipImageProcessor": "SiglipImageProcessorPil",
    "ViTImageProcessor": "ViTImageProcessorPil",
    "DeiTImageProcessor": "DeiTImageProcessorPil",
    "BitImageProcessor": "BitImageProcessorPil",
    "DINOv3ViTImageProcessor": "ViTImageProcessorPil",
    "ConvNextImageProcessor": "ConvNextImageProcessorPil",
    "EfficientNetImageProcessor": "EfficientNetImageProcessorPil",
}
FILES = ("processor_config.json", "preprocessor_config.json")  # in the library's order
IMAGENET = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}


def _shortest_edge(side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}}


def _cropped(side: int) -> dict[str, Any]:
    return _shortest_edge(side) | {"crop_size": {"height": side, "width": side}}


def _square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


# How each class is told the side of its square.
SIZES: dict[str, Callable[[int], dict[str, Any]]] = {
    "CLIPImageProcessor": _cropped,
    "BitImageProcessor": _cropped,
    "ConvNextImageProcessor": _shortest_edge,
}


@dataclass(frozen=True)
class PixelRange:
    """What preprocessing makes of any picture.

    side: S. black, white: (3, 1, 1) float32, the values of a black and of a white pixel.
    """

    side: int
    black: Tensor
    white: Tensor

    def undo(self, pixel_values: Tensor) -> Tensor:  # (I, 3, S, S) -> uint8
        """The pixels as 0 to 255."""
        black, white = self.black.to(pixel_values), self.white.to(pixel_values)
        return (((pixel_values - black) / (white - black)).clamp(0, 1) * 255).round().byte()


def measure(image_processor: BaseImageProcessor, *, where: str = "the vision tower") -> PixelRange:
    """Side and range of the pixels, by a wide black and a tall white picture.

    So it holds whatever the steps are: a crop or none, one normalisation or two.

    Raises:
        ValueError: the two do not become squares of one size.
    """
    pixels = []
    for size, colour in (((96, 48), "black"), ((48, 96), "white")):
        picture = Image.new("RGB", size, colour)
        try:
            pixels.append(image_processor(images=picture, return_tensors="pt")["pixel_values"][0])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{where}: its preprocessing fails ({first_line(error)})") from error
    heights, widths = {p.shape[1] for p in pixels}, {p.shape[2] for p in pixels}
    if heights != widths or len(heights) > 1:
        raise ValueError(
            f"{where}: its preprocessing makes {pixels[0].shape[2]}x{pixels[0].shape[1]} of a wide "
            "picture, but a tower takes squares of one size; give size a height and a width, or "
            "add a center crop, in preprocessor_config.json"
        )
    side = heights.pop()
    middle = [p[:, side // 2, side // 2].to(torch.float32)[:, None, None] for p in pixels]
    return PixelRange(side, *middle)


def read_image_processor(folder: Path, *, default: str) -> BaseImageProcessor | None:
    """The preprocessing that a folder's files describe; None if it has no such file.

    Args:
        default: a key of `PIL_CLASSES`, for a file that names no class.
    Raises:
        ValueError: a file cannot be read, or it names a class that is unknown here.
    """
    steps = _described_steps(folder)
    if steps is None:
        return None
    named = steps.get("image_processor_type") or steps.get("feature_extractor_type") or ""
    name = str(named).removesuffix("Pil").removesuffix("Fast")
    name = name.replace("FeatureExtractor", "ImageProcessor") or default
    if name not in PIL_CLASSES:
        raise ValueError(
            f"{folder}: preprocessor_config.json names {named!r}, which is unknown here; there are "
            f"{', '.join(PIL_CLASSES)}"
        )
    cls = getattr(transformers, PIL_CLASSES[name])
    try:
        processor: BaseImageProcessor = cls.from_dict(steps)
    except Exception as error:  # wrong types raise almost anything
        raise ValueError(
            f"{folder}: preprocessor_config.json cannot be used ({first_line(error)}); fetch the "
            "folder again"
        ) from error
    return processor


def default_image_processor(name: str, side: int, *, is_imagenet: bool) -> BaseImageProcessor:
    """A library's preprocessing at a given side.

    Args:
        name: a key of `PIL_CLASSES`. is_imagenet: normalise by ImageNet's mean and deviation
            rather than by the class's own.
    """
    options = SIZES.get(name, _square)(side) | (IMAGENET if is_imagenet else {})
    processor: BaseImageProcessor = getattr(transformers, PIL_CLASSES[name])(**options)
    return processor


def at_side(processor: BaseImageProcessor, side: int, *, found: int) -> BaseImageProcessor:
    """The same steps for squares of `side` pixels; a crop keeps its share of the picture.

    Args:
        found: the side that the processor makes.
    """
    steps = processor.to_dict()
    for name in ("size", "crop_size"):
        if steps.get(name):
            lengths = dict(steps[name])
            steps[name] = {key: round(lengths[key] * side / found) for key in lengths}
    scaled: BaseImageProcessor = type(processor).from_dict(steps)
    return scaled


def _described_steps(folder: Path) -> dict[str, Any] | None:
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            steps = described.get("image_processor") if name == FILES[0] else described
        except (ValueError, AttributeError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read ({first_line(error)}); fetch it again"
            ) from error
        if isinstance(steps, dict):
            return steps
    return None


def first_line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]
