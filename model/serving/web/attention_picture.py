"""Owns drawing an attention map over its image."""

from PIL import Image
from torch import Tensor

SIDE = 448  # pixels
GLOW = (255, 96, 0)
OPACITY = 0.85  # of the glow over the patch with the most attention
GREY = 0.6  # how much of the picture's own colour is taken out


def draw_look(picture: Image.Image, attention: Tensor) -> Image.Image:
    """The picture with a glow over each patch, in proportion to its attention.

    Args:
        picture: as the vision tower sees it, cropped.
        attention: (side, side), a map of `VLMEngine.look`.
    """
    shares = attention / attention.max().clamp(min=1e-12)
    opacity = Image.fromarray((shares * OPACITY * 255).round().byte().numpy())
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grey = Image.blend(picture, picture.convert("L").convert("RGB"), GREY)
    glow = Image.new("RGB", grey.size, GLOW)
    return Image.composite(glow, grey, opacity.resize(grey.size, Image.Resampling.BICUBIC))
