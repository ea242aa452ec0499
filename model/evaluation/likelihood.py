"""Owns the likelihood of given answers: exact match under greedy decoding, and the loss of each.

Shapes: B batch, T tokens, I images, P patches, D hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

from model.image_fusion import check_image_count, fuse_images
from model.model_minimind import IGNORE_INDEX
from model.model_vlm import MiniMindVLM

LOGITS_AT_ONCE = 2048  # supervised tokens whose logits are held together


@dataclass(frozen=True)
class AnswerScore:
    """The score of one answer, given the conversation before it."""

    is_right: bool  # greedy decoding would generate exactly this answer
    loss_sum: float  # nats
    num_tokens: int

    @property
    def loss(self) -> float:
        """Nats per token: the length-normalised likelihood, negated."""
        return self.loss_sum / self.num_tokens


@dataclass(frozen=True)
class LabelledSequence:
    """A conversation whose answers are scored: input_ids, labels (T,) int64, image_mask (T,) bool.

    Answers are the tokens with labels. Features (I, P, D) are of `encode_images`, None without
    images.
    """

    input_ids: Tensor
    labels: Tensor
    image_mask: Tensor
    features: Tensor | None


@torch.inference_mode()
def score_answers(model: MiniMindVLM, inputs: dict[str, Tensor]) -> list[list[AnswerScore]]:
    """Score every answer of a batch in one forward pass.

    This is teacher forcing: each token is predicted from the reference tokens before it. An answer
    is right if each of its tokens, the end token included, is the most likely one; exactly then
    greedy decoding would generate it.

    Args:
        inputs: a collator's, with `labels` (B, T); `features` (I, P, D) may replace
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


def score_sequences(
    model: MiniMindVLM, sequences: list[LabelledSequence], *, batch_size: int
) -> list[list[AnswerScore]]:
    """Scores of each conversation's answers; conversations of similar length share a batch."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].input_ids))
    scores: list[list[AnswerScore]] = [[] for _ in sequences]
    for start in range(0, len(sequences), batch_size):
        some = order[start : start + batch_size]
        batch = _pad([sequences[i] for i in some], device=model.device)
        for i, answers in zip(some, score_answers(model, batch), strict=True):
            scores[i] = answers
    return scores


@torch.inference_mode()
def score_candidates(
    model: MiniMindVLM, sequences: list[LabelledSequence], features: Tensor
) -> list[list[AnswerScore]]:
    """Score several answers to one prompt; the prompt, with its images, runs through the model
    only once and stays in the key-value cache.

    Args:
        sequences: conversations, without features, that differ from the last answer on, which is
            the only one with labels.
        features: (S, I, P, D), S alternatives for the images of the prompt.
    Returns:
        For each of the S, the scores of the answers.
    """
    texts = [sequence.input_ids.tolist() for sequence in sequences]
    first = min(int((s.labels != IGNORE_INDEX).nonzero()[0]) for s in sequences)
    shared = next(
        (i for i, tokens in enumerate(zip(*texts, strict=False)) if len(set(tokens)) > 1),
        min(map(len, texts)),
    )
    # The last shared token belongs to the second pass: its logits predict each answer's first one.
    split = min(shared, first) - 1
    head, device = sequences[0], model.device
    prompt, mask = (
        x[None, :split].expand(len(features), -1).to(device)
        for x in (head.input_ids, head.image_mask)
    )
    cache = DynamicCache(config=model.config)
    embeds = _embed(model, prompt, mask, features.flatten(0, 1))
    model.model(embeds, cache=cache, is_right_padded=True)
    cache.batch_repeat_interleave(len(sequences))
    tails = [
        LabelledSequence(s.input_ids[split:], s.labels[split:], s.image_mask[split:], None)
        for s in sequences
    ]
    batch = _pad(tails * len(features), device=device)
    embeds = model.model.embed_tokens(batch["input_ids"])
    hidden, _ = model.model(embeds, cache=cache, is_right_padded=True)
    scores = [scores[0] for scores in _score_hidden(model, hidden, batch["labels"])]
    num = len(sequences)
    return [scores[start : start + num] for start in range(0, len(scores), num)]


def _embed(
    model: MiniMindVLM, input_ids: Tensor, image_mask: Tensor, features: Tensor | None
) -> Tensor:
    """(B, T) ids and the features of the batch's images to (B, T, D)."""
    embeds = model.model.embed_tokens(input_ids)
    if features is None:
        return embeds
    num_expected = int(image_mask.sum()) // model.config.num_image_tokens
    check_image_count([num_expected], len(features), per_sample=None)
    return fuse_images(embeds, image_mask, features)


def _pad(sequences: list[LabelledSequence], *, device: torch.device) -> dict[str, Tensor | None]:
    """Sequences as a batch, padded on the right."""
    lengths = torch.tensor([len(s.input_ids) for s in sequences])
    images = [s.features for s in sequences if s.features is not None]
    input_ids = pad_sequence([s.input_ids for s in sequences], batch_first=True)
    labels = pad_sequence(
        [s.labels for s in sequences], batch_first=True, padding_value=IGNORE_INDEX
    )
    image_mask = pad_sequence([s.image_mask for s in sequences], batch_first=True)
    return {
        "input_ids": input_ids.to(device),
        "labels": labels.to(device),
        "image_mask": image_mask.to(device),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(device),
        "features": torch.cat(images) if images else None,
    }


def _score_hidden(model: MiniMindVLM, hidden: Tensor, labels: Tensor) -> list[list[AnswerScore]]:
    """Answers' scores from hidden states (B, T, D); only supervised tokens get logits."""
    labels = labels[:, 1:]
    is_target = labels != IGNORE_INDEX
    losses, hits = [], []
    chosen = hidden[:, :-1][is_target].split(LOGITS_AT_ONCE)
    targets = labels[is_target].split(LOGITS_AT_ONCE)
    for some, wanted in zip(chosen, targets, strict=True):
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
            is_right, loss_sum = bool(hit[span][:length].all()), float(loss[span].sum())
            row.append(AnswerScore(is_right, loss_sum, num_tokens=end - start))
        scores.append(row)
    return scores


def _runs(labels: list[int]) -> list[tuple[int, int]]:
    """Start and end of each run of supervised tokens."""
    runs, start = [], None
    for i, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = i
        elif label == IGNORE_INDEX and start is not None:
            runs.append((start, i))
            start = None
    return runs
