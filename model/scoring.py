"""Owns how well answers are given: exact match and loss of each, and what to make of many.

Shapes: B batch, T tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.model_minimind import IGNORE_INDEX

Z_95 = 1.6449  # one-sided 95%


@dataclass(frozen=True)
class AnswerScore:
    """One answer of a conversation, given what stands before it."""

    is_right: bool  # greedy decoding would have given exactly this answer
    loss_sum: float  # nats
    num_tokens: int


@torch.inference_mode()
def score_answers(model: nn.Module, inputs: dict[str, Tensor]) -> list[list[AnswerScore]]:
    """Score every answer of a batch in one forward pass.

    Each answer is judged given the true answers before it. It is right if each of its tokens, up
    to and with its end, is the likeliest one after the true ones before: that is when greedy
    decoding gives it.

    Args:
        inputs: of a collator, with `labels` (B, T).
    Returns:
        For each row, its answers in order.
    """
    labels = inputs["labels"][:, 1:]
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1]
    is_target = labels != IGNORE_INDEX
    chosen, targets = logits[is_target].float(), labels[is_target]
    losses = F.cross_entropy(chosen, targets, reduction="none").cpu()
    hits = (chosen.argmax(-1) == targets).cpu()
    eos, scores, position = model.config.eos_token_id, [], 0
    for row_labels in labels.tolist():
        row = []
        for start, end in _runs(row_labels):
            span = slice(position, position + end - start)
            position += end - start
            answer = row_labels[start:end]
            length = answer.index(eos) + 1 if eos in answer else len(answer)
            row.append(
                AnswerScore(
                    is_right=bool(hits[span][:length].all()),
                    loss_sum=float(losses[span].sum()),
                    num_tokens=end - start,
                )
            )
        scores.append(row)
    return scores


def _runs(labels: list[int]) -> list[tuple[int, int]]:
    """Where supervised runs begin and end."""
    runs, start = [], None
    for i, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = i
        elif label == IGNORE_INDEX and start is not None:
            runs.append((start, i))
            start = None
    return runs


def wilson_lower_bound(num_right: int, num_all: int) -> float:
    """Lower end of a one-sided 95% interval for a share.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    if num_all == 0:
        return 0.0
    share, z2 = num_right / num_all, Z_95**2
    centre = share + z2 / (2 * num_all)
    spread = Z_95 * math.sqrt(share * (1 - share) / num_all + z2 / (4 * num_all**2))
    return (centre - spread) / (1 + z2 / num_all)
