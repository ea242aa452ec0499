"""Owns the validation loss."""

from collections.abc import Callable
from contextlib import closing

import torch

from trainer.loop.engine import autocast
from trainer.loop.loop_state import AnyEngine
from trainer.loop.steps import Batches, agree, shares_of
from trainer.ranks.group import Ranks
from trainer.ranks.signals import StopSignal


@torch.no_grad()
def validation_loss(
    engine: AnyEngine,
    batches: Batches,
    *,
    ranks: Ranks,
    stop: StopSignal,
    dtype: str,
    report: Callable[[str], None],
) -> tuple[float, int, int] | None:
    """Mean loss per supervised token of the validation data, the number of those tokens, and the
    number of samples that could not be used; None if any rank received a stop signal first.

    Args:
        batches: this rank's; there are as many on every rank.
        report: called with a line for each sample that could not be used.
    Raises:
        ValueError: not one sample can be used. DataFault: a rank cannot have its data.
    """
    total, num_tokens, num_bad = 0.0, 0.0, 0.0
    with engine.evaluating() as model, closing(shares_of(batches, 1)) as shares:
        for share in shares:
            if agree(share, ranks, stop, []).is_stopping:
                return None
            for batch in share.batches:
                with autocast(ranks.device, dtype):
                    output = model(**batch.inputs_on(ranks.device))
                total += output.loss.item() * batch.num_supervised
                num_tokens += batch.num_supervised
                num_bad += len(batch.bad_samples)
                for bad in batch.bad_samples:
                    report(f"validation sample left out: {bad.reason}")
    total, num_tokens, num_bad = ranks.host_sum([total, num_tokens, num_bad])
    if not num_tokens:
        raise ValueError("the validation data holds no usable sample; see --val_data_path")
    return total / num_tokens, int(num_tokens), int(num_bad)
