"""Owns the loss of each source of a mixture, taken from the logits of a step that is run anyhow.

Shapes: N supervised tokens of a batch, V vocabulary, S sources.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.loop.steps import MicroBatch


@torch.no_grad()
def source_sums(logits: Tensor, batch: MicroBatch, *, num_sources: int) -> Tensor:
    """Sum of the losses of a batch's supervised tokens, and their number, by source: (2 S,).

    Args:
        logits: (N, V) at the batch's `target_positions`.
    """
    sums = torch.zeros(2, num_sources, device=logits.device)
    if batch.row_sources is None or not len(logits):
        return sums.flatten()
    inputs = batch.inputs_on(logits.device)
    labels, positions = inputs["labels"], inputs["target_positions"]
    targets = F.pad(labels[:, 1:], (0, 1)).flatten()[positions]
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    rows = torch.tensor(batch.row_sources, device=logits.device)
    of_tokens = rows[positions // labels.shape[1]]
    sums[0].index_add_(0, of_tokens, losses)
    sums[1].index_add_(0, of_tokens, torch.ones_like(losses))
    return sums.flatten()
