"""Owns the picture of where the model looks: an attention map over the image it belongs to."""

from PIL import Image
from torch import Tensor

SIDE = 448  # pixels
GLOW = (255, 96, 0)
OPACITY = 0.85  # of the glow over the patch that is looked at most
GREY = 0.6  # how far the picture's own colours step back


def draw_look(picture: Image.Image, attention: Tensor) -> Image.Image:
    """The picture with a glow over each patch, by its share of the strongest patch's.

    Args:
        picture: as the tower sees it.
        attention: (side, side) shares, such as `VLMEngine.look` gives.
    """
    shares = attention / attention.max().clamp(min=1e-12)
    opacity = Image.fromarray((shares * OPACITY * 255).round().byte().numpy())
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grey = Image.blend(picture, picture.convert("L").convert("RGB"), GREY)
    glow = Image.new("RGB", grey.size, GLOW)
    return Image.composite(glow, grey, opacity.resize(grey.size, Image.Resampling.BICUBIC))
