"""Owns losses of single tokens, taken from the logits of a step: weighted, and by source.

Shapes: N supervised tokens of a batch, V vocabulary, S sources.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.model_minimind import MiniMindOutput
from trainer.loop.steps import MicroBatch


def token_losses(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The loss of each supervised token: (N,).

    Args:
        logits: (N, V) at the batch's `target_positions`.
        inputs: of the batch, on the device of the logits.
    """
    targets = F.pad(inputs["labels"][:, 1:], (0, 1)).flatten()[inputs["target_positions"]]
    return F.cross_entropy(logits.float(), targets, reduction="none")


def loss_sum(output: MiniMindOutput, inputs: dict[str, Tensor], batch: MicroBatch) -> Tensor:
    """The sum of a batch's losses, each times its weight where there are weights."""
    if batch.target_weights is None:
        assert output.loss is not None
        return output.loss * batch.num_supervised
    assert output.logits is not None
    weights = batch.target_weights.to(output.logits.device, non_blocking=output.logits.is_cuda)
    return (token_losses(output.logits, inputs) * weights).sum()


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
    losses = token_losses(logits, inputs)
    sums[0].index_add_(0, sources, losses)
    sums[1].index_add_(0, sources, torch.ones_like(losses))
    return sums.flatten()
