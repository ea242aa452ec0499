"""Owns choosing the next tokens of a batch from their logits: penalties, truncation, draws.

All rows are chosen at once, on the logits' device. A draw takes one random number a row, from the
row's own generator, so that neighbours do not change it.

Shapes: B unfinished answers, V vocabulary, C candidates.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.generation.sampling import Sampling

LEAST_TOP_P = 1e-6  # float32 tells it from 0, so that the likeliest token is always left
FIRST_CANDIDATES = 256  # nearly always hold the nucleus; sorting all of V takes ten times as long


class Sampler:
    """Chooses tokens for the answers of one batch, which all began at the same time.

    Args:
        prompts: of each answer, (T,) without padding.
        seeds: of each answer's random numbers; None draws a new one.
        end_ids: tokens that end an answer; forbidden before `sampling.min_tokens`.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Tensor],
        *,
        seeds: Sequence[int | None],
        end_ids: Collection[int],
        vocab_size: int,
        device: torch.device,
    ):
        self._sampling, self._num_chosen = sampling, 0
        self._generators = [_generator(seed) for seed in seeds] if sampling.temperature else []
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
        shape = (len(prompts), vocab_size)
        self._is_held: Tensor | None = None  # (B, V) by prompt or answer
        self._counts: Tensor | None = None  # (B, V) in the answer alone
        if sampling.repetition_penalty != 1:
            held = torch.zeros(shape, dtype=torch.bool)
            for row, ids in zip(held, prompts, strict=True):
                row[ids] = True
            self._is_held = held.to(device)
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros(shape, device=device)

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each answer.

        Args:
            logits: (B, V) float32.
        Returns:
            (B,) int64.
        """
        scores = self._penalised(logits)
        if self._sampling.temperature == 0:
            tokens = scores.argmax(-1)
        else:
            tokens = draw(scores, self._sampling, self._uniform().to(scores.device))
        self._note(tokens)
        return tokens

    def _uniform(self) -> Tensor:
        """A number in [0, 1) of each answer's own: (B,)."""
        return torch.cat([torch.rand(1, generator=own) for own in self._generators])

    def _note(self, tokens: Tensor) -> None:
        """These tokens (B,) were chosen."""
        self._num_chosen += 1
        if self._is_held is not None:
            self._is_held.scatter_(1, tokens[:, None], True)
        if self._counts is not None:
            self._counts.scatter_add_(1, tokens[:, None], self._counts.new_ones(len(tokens), 1))

    @property
    def changes_logits(self) -> bool:
        """Whether there are penalties, or an end that is forbidden still."""
        is_penalised = self._is_held is not None or self._counts is not None
        return is_penalised or self._num_chosen < self._sampling.min_tokens

    @property
    def way(self) -> tuple[float, ...]:
        """Samplers that agree in it draw alike from the same logits and random number."""
        own = self._sampling
        return own.temperature, own.top_k, own.top_p, own.min_p

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these answers alone."""
        if self._generators:
            self._generators = [self._generators[row] for row in rows]
        kept = torch.tensor(rows, dtype=torch.int64, device=self._end_ids.device)
        self._is_held = None if self._is_held is None else self._is_held[kept]
        self._counts = None if self._counts is None else self._counts[kept]

    def _penalised(self, logits: Tensor) -> Tensor:
        own = self._sampling
        if self._is_held is not None:
            penalty = own.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._is_held, penalised, logits)
        if self._counts is not None:
            logits = logits - own.frequency_penalty * self._counts
            logits = logits - own.presence_penalty * (self._counts > 0)
        if self._num_chosen < own.min_tokens:
            logits = logits.index_fill(1, self._end_ids, -torch.inf)
        return logits


def choose_each(samplers: Sequence[Sampler], logits: Tensor) -> Tensor:
    """The next token of each row, by a sampler of its own: what its `choose` gives, but rows that
    are drawn in one way are drawn at once.

    Args:
        samplers: B, of one answer each. logits: (B, V) float32.
    Returns:
        (B,) int64.
    """
    if any(own.changes_logits for own in samplers):
        logits = logits.clone()
    alike: dict[Any, list[int]] = {}
    for row, own in enumerate(samplers):
        if own.changes_logits:
            logits[row] = own._penalised(logits[row : row + 1])[0]
        if own._sampling.temperature:
            alike.setdefault(own.way, []).append(row)
    tokens = logits.argmax(-1)
    for rows in alike.values():
        uniform = torch.cat([samplers[row]._uniform() for row in rows]).to(logits.device)
        places = torch.tensor(rows, device=logits.device)
        tokens[places] = draw(logits[places], samplers[rows[0]]._sampling, uniform)
    for row, own in enumerate(samplers):
        own._note(tokens[row : row + 1])
    return tokens


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def draw(scores: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """One token a row, by inverting the cumulative distribution.

    Args:
        scores: (B, V) logits. uniform: (B,) in [0, 1).
    """
    # With the peak at 0 no tiny temperature overflows; softmax is the same.
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
    probabilities = scores.softmax(-1)
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return _invert(probabilities, uniform)
    shares, ids = candidates(probabilities, sampling)
    return ids.gather(1, _invert(shares, uniform)[:, None])[:, 0]


def candidates(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that top-k, top-p and min-p leave, in this order, as transformers applies them.

    Args:
        probabilities: (B, V), each row of sum 1.
    Returns:
        Probabilities (B, C) in falling order, 0 for what is left out, and their ids (B, C).
    """
    size = probabilities.shape[-1]
    shares, ids = probabilities.topk(min(sampling.top_k or FIRST_CANDIDATES, size))
    total: float | Tensor = 1.0
    if sampling.top_k:
        total = shares.sum(-1, keepdim=True)
    elif not _hold_all(shares, sampling):
        shares, ids = _in_falling_order(probabilities)
    in_front = shares.cumsum(-1) - shares
    top_p = max(sampling.top_p, LEAST_TOP_P)
    is_left = in_front < top_p * total if top_p < 1 else shares > 0
    is_left &= shares >= sampling.min_p * shares[:, :1]
    return shares * is_left, ids


def _in_falling_order(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """As `sort`, a third of whose time NumPy takes on a CPU, given values alone: the bits of floats
    above 0 are in the floats' order, and their ids follow them in one integer."""
    if not probabilities.is_cpu:
        return probabilities.sort(-1, descending=True)
    ids = torch.arange(probabilities.shape[-1])
    keys = (probabilities.view(torch.int32).long() << 32) - ids
    keys = -torch.from_numpy(np.sort(-keys.numpy(), -1))
    ids = (-keys) & 0xFFFFFFFF
    return ((keys + ids) >> 32).int().view(torch.float32), ids


def _hold_all(shares: Tensor, sampling: Sampling) -> bool:
    """Whether the likeliest tokens, in falling order, hold all that top-p or min-p leave."""
    is_nucleus = shares.sum(-1) >= sampling.top_p if sampling.top_p < 1 else shares[:, 0] < 0
    return bool((is_nucleus | (shares[:, -1] < sampling.min_p * shares[:, 0])).all())


def _invert(shares: Tensor, uniform: Tensor) -> Tensor:
    """The index (B,) at which the running sum of (B, C) passes each row's random number (B,)."""
    sums = shares.cumsum(-1)
    total = sums[:, -1:]
    # Below the total however the product is rounded, or a token without probability would follow.
    wanted = torch.minimum(
        uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    return torch.searchsorted(sums, wanted, right=True)[:, 0]
