"""Owns `VisionProj`, the projection of the tower's patches to the language model's width.

Shapes: P image tokens, V width of the vision tower, D hidden, m patches a side of an image token.
"""

import math

from torch import Tensor, nn

PROJECTORS = ("linear", "mlp")


class VisionProj(nn.Module):
    """From the tower's patches to the language model's width.

    Generation 2 has one linear layer, generation 3 a LayerNorm and two layers. With `token_merge`
    m > 1, m x m neighbouring patches are first joined to one that is m * m times as wide.
    Source: Shi et al., "Real-Time Single Image and Video Super-Resolution" (2016).
    """

    def __init__(
        self,
        vision_hidden_size: int = 768,
        hidden_size: int = 512,
        *,
        projector: str = "linear",
        token_merge: int = 1,
    ):
        super().__init__()
        self.token_merge = token_merge
        width = vision_hidden_size * token_merge**2
        if projector == "mlp":
            self.mlp = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, hidden_size),
                nn.GELU(),
                nn.Linear(hidden_size, hidden_size),
            )
        else:
            self.vision_proj = nn.Sequential(nn.Linear(width, hidden_size))

    def forward(self, patches: Tensor) -> Tensor:  # (..., P * m * m, V) -> (..., P, D)
        if self.token_merge > 1:
            patches = merge_patches(patches, self.token_merge)
        layers = self.mlp if hasattr(self, "mlp") else self.vision_proj
        features: Tensor = layers(patches)
        return features


def merge_patches(patches: Tensor, side: int) -> Tensor:
    """Join `side` x `side` neighbouring patches of a square grid to one token (pixel shuffle).

    Args:
        patches: (..., G * G, V), row by row.
    Returns:
        (..., (G / side)^2, side * side * V); a token holds its patches row by row.
    """
    *batch, num_patches, width = patches.shape
    grid = math.isqrt(num_patches) // side
    blocks = patches.reshape(-1, grid, side, grid, side, width).transpose(2, 3)
    return blocks.reshape(*batch, grid * grid, side * side * width)
