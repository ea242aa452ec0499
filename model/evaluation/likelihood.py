"""Owns the likelihood of given answers: exact match under greedy decoding, and the loss of each.

Shapes: B batch, T tokens, I images, P patches, D hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

from model.image_fusion import check_image_count, fuse_images
from model.model_minimind import IGNORE_INDEX

LOGITS_AT_ONCE = 2048  # supervised tokens whose logits are held together


@dataclass(frozen=True)
class AnswerScore:
    """One answer of a conversation, given what stands before it."""

    is_right: bool  # greedy decoding would have given exactly this answer
    loss_sum: float  # nats
    num_tokens: int

    @property
    def loss(self) -> float:
        """Nats per token: the length-normalised likelihood, negated."""
        return self.loss_sum / self.num_tokens


@dataclass(frozen=True)
class Row:
    """One conversation to score: input_ids, labels (T,) int64; image_mask (T,) bool; features
    (I, P, D) as `encode_images` gives them, or None without images."""

    input_ids: Tensor
    labels: Tensor
    image_mask: Tensor
    features: Tensor | None


@torch.inference_mode()
def score_answers(model: nn.Module, inputs: dict[str, Tensor]) -> list[list[AnswerScore]]:
    """Score every answer of a batch in one forward pass.

    Each answer is judged given the true answers before it. It is right if each of its tokens, up
    to and with its end, is the likeliest one after the true ones before: that is when greedy
    decoding gives it.

    Args:
        inputs: of a collator, with `labels` (B, T); `features` (I, P, D) may stand for
            `pixel_values`.
    Returns:
        For each row, its answers in order.
    """
    features = inputs.get("features")
    if features is None and inputs.get("pixel_values") is not None:
        features = model.encode_images(inputs["pixel_values"])
    embeds = _embed(model, inputs["input_ids"], inputs["image_mask"], features)
    hidden, _ = model.model(embeds, attention_mask=inputs["attention_mask"], is_right_padded=True)
    return _score_hidden(model, hidden, inputs["labels"])


def score_rows(model: nn.Module, rows: list[Row], *, batch_size: int) -> list[list[AnswerScore]]:
    """Score conversations, those of like length together; the results keep the rows' order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    scores: list[list[AnswerScore]] = [[] for _ in rows]
    for start in range(0, len(rows), batch_size):
        some = order[start : start + batch_size]
        batch = _pad([rows[i] for i in some], device=model.device)
        for i, row_scores in zip(some, score_answers(model, batch), strict=True):
            scores[i] = row_scores
    return scores


@torch.inference_mode()
def score_candidates(model: nn.Module, rows: list[Row]) -> list[AnswerScore]:
    """Score several answers to one prompt; the prompt, with its images, is read only once.

    Args:
        rows: conversations with the same images that differ from the last answer on, which is
            the only one with labels.
    """
    texts = [row.input_ids.tolist() for row in rows]
    first = min(int((row.labels != IGNORE_INDEX).nonzero()[0]) for row in rows)
    shared = next(
        (i for i, tokens in enumerate(zip(*texts, strict=False)) if len(set(tokens)) > 1),
        min(map(len, texts)),
    )
    # The last shared token is read with the answers: what it foretells is their first token.
    split = min(shared, first) - 1
    head, device = rows[0], model.device
    prompt, mask = (x[None, :split].to(device) for x in (head.input_ids, head.image_mask))
    cache = DynamicCache(config=model.config)
    embeds = _embed(model, prompt, mask, head.features)
    model.model(embeds, past_key_values=cache, is_right_padded=True)
    cache.batch_repeat_interleave(len(rows))
    tails = _pad(
        [Row(r.input_ids[split:], r.labels[split:], r.image_mask[split:], None) for r in rows],
        device=device,
    )
    embeds = model.model.embed_tokens(tails["input_ids"])
    hidden, _ = model.model(embeds, past_key_values=cache, is_right_padded=True)
    return [scores[0] for scores in _score_hidden(model, hidden, tails["labels"])]


def _embed(
    model: nn.Module, input_ids: Tensor, image_mask: Tensor, features: Tensor | None
) -> Tensor:
    """(B, T) ids and the features of the batch's images to (B, T, D)."""
    embeds = model.model.embed_tokens(input_ids)
    if features is None:
        return embeds
    num_expected = int(image_mask.sum()) // model.config.num_image_tokens
    check_image_count([num_expected], len(features), per_sample=None)
    return fuse_images(embeds, image_mask, features)


def _pad(rows: list[Row], *, device: torch.device) -> dict[str, Tensor | None]:
    """Rows as a batch, padded behind the text."""
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    images = [row.features for row in rows if row.features is not None]
    labels = pad_sequence([r.labels for r in rows], batch_first=True, padding_value=IGNORE_INDEX)
    return {
        "input_ids": pad_sequence([r.input_ids for r in rows], batch_first=True).to(device),
        "labels": labels.to(device),
        "image_mask": pad_sequence([r.image_mask for r in rows], batch_first=True).to(device),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(device),
        "features": torch.cat(images) if images else None,
    }


def _score_hidden(model: nn.Module, hidden: Tensor, labels: Tensor) -> list[list[AnswerScore]]:
    """Answers' scores from hidden states (B, T, D); logits are made of supervised tokens only."""
    labels = labels[:, 1:]
    is_target = labels != IGNORE_INDEX
    losses, hits = [], []
    chosen, targets = hidden[:, :-1][is_target], labels[is_target]
    for some, wanted in zip(chosen.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE),
                            strict=True):  # fmt: skip
        logits = model.lm_head(some).float()
        losses.append(F.cross_entropy(logits, wanted, reduction="none").cpu())
        hits.append((logits.argmax(-1) == wanted).cpu())
    loss, hit = torch.cat(losses).double(), torch.cat(hits)
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
                    is_right=bool(hit[span][:length].all()),
                    loss_sum=float(loss[span].sum()),
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
