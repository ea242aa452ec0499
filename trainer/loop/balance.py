"""Owns the load-balance loss of experts that are balanced over all tokens of a step.

That loss is not a sum over parts: it multiplies how often each expert is used in the whole step by
its mean probability. So the use is summed first, over ranks and micro-steps, before any of them
has a loss. With several micro-steps their routing is found by a forward pass without gradient;
holding all their graphs would need the memory that accumulation saves.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.feed_forward import balance_loss
from model.model_minimind import MiniMindOutput
from trainer.loop.engine import autocast
from trainer.loop.loop_state import Run
from trainer.loop.steps import MicroBatch


class StepBalance:
    """The load-balance loss of one step, by micro-batch.

    Args:
        num_tokens, num_sequences: of the whole step, over all ranks, without padding.
    """

    def __init__(
        self, run: Run, batches: Sequence[MicroBatch], *, num_tokens: int, num_sequences: int
    ):
        self._ranks = run.ranks
        self._num_tokens, self._num_sequences = max(num_tokens, 1), num_sequences
        config: Any = run.engine.module.config
        self._factor: float = config.aux_loss_alpha
        is_of_step = config.use_moe and not config.seq_aux and self._factor > 0
        self._slots = routed_slots(run, batches) if is_of_step and len(batches) > 1 else None

    def aux_sum(self, output: MiniMindOutput, batch: MicroBatch) -> Tensor:
        """The micro-batch's part of the step's loss, times the number of sequences of the step: so
        losses of either kind add up to a sum over sequences."""
        if output.expert_use is None:
            assert output.aux_loss is not None
            return output.aux_loss * batch.num_sequences
        slots = self._slots
        if slots is None:  # the only micro-step: its routing is known now
            slots = self._ranks.device_sum(output.expert_use[:, 0].detach().clone())
        loss = balance_loss(slots, output.expert_use[:, 1], num_tokens=self._num_tokens)
        return loss * (self._factor * self._num_sequences)


@torch.no_grad()
def routed_slots(run: Run, batches: Sequence[MicroBatch]) -> Tensor:
    """How often the tokens of a step are routed to each expert, over all ranks: (L, E)."""
    gpus = [run.device] if run.device.type == "cuda" else []
    # With dropout, the pass with gradient must draw what this one drew.
    config: Any = run.engine.module.config
    same_draws = torch.random.fork_rng(gpus) if config.dropout > 0 else contextlib.nullcontext()
    with same_draws, autocast(run.device, run.args.dtype):
        uses = [run.engine.module(**b.inputs_on(run.device)).expert_use[:, 0] for b in batches]
    return run.ranks.device_sum(torch.stack(uses).sum(0))
