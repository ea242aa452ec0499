"""Owns the loss of each source of a mixture, taken from the logits of a step that is run anyhow.

Shapes: N supervised tokens of a batch, V vocabulary, S sources.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.loop.steps import MicroBatch


@torch.no_grad()
def source_sums(
    logits: Tensor, inputs: dict[str, Tensor], batch: MicroBatch, *, num_sources: int
) -> Tensor:
    """Sum of the losses of a batch's supervised tokens, and their number, by source: (2 S,).

    Args:
        logits: (N, V) at the batch's `target_positions`.
        inputs: of the batch, on the device of the logits.
    """
    sums = torch.zeros(2, num_sources, device=logits.device)
    if batch.target_sources is None or not len(logits):
        return sums.flatten()
    sources = batch.target_sources.to(logits.device, non_blocking=logits.is_cuda)
    targets = F.pad(inputs["labels"][:, 1:], (0, 1)).flatten()[inputs["target_positions"]]
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    sums[0].index_add_(0, sources, losses)
    sums[1].index_add_(0, sources, torch.ones_like(losses))
    return sums.flatten()
