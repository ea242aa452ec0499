"""Offers pictures that differ from one another as photos do: their colours change smoothly."""

import numpy as np
from PIL import Image


def smooth_picture(seed: int, *, size: tuple[int, int] = (200, 160)) -> Image.Image:
    """A picture of 6 x 6 random colours, blended."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
