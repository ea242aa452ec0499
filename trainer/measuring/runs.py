"""Owns the two ways to train that are measured: the ordinary one, and a plain one to compare with.

Shapes: B batch, T tokens, I images, V vocabulary.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from dataset.lm_dataset import IGNORE_INDEX, Sample, VLMDataset
from model.model_vlm import MiniMindVLM
from trainer.loop.loop_state import Run
from trainer.loop.steps import Share, shares_of
from trainer.loop.train_loop import train_step
from trainer.measuring.matrix_rate import wait_for
from trainer.measuring.phases import PhaseClock, count_flop
from trainer.ranks.group import Ranks
from trainer.ranks.signals import StopSignal
from trainer.run.features import keep_features
from trainer.run.setup import make_engine, make_run, prepare
from trainer.tracking.metrics import Metrics
from trainer.train_args import Stage, TrainArgs

UNTIMED_STEPS = 3  # at the start of a round: batches that were loaded before it are used up


@dataclass(frozen=True)
class Round:
    """What some steps took; tokens with and without padding."""

    seconds: float
    wait_s: float
    steps: int
    samples: int
    tokens: int
    padded_tokens: int


class OrdinaryRun:
    """A stage as its script runs it, but that nothing is written.

    Args:
        keeps_plain: keep a copy of the model before its first step, for `PlainRun`.
    """

    def __init__(self, stage: Stage, args: TrainArgs, ranks: Ranks, *, keeps_plain: bool):
        self.args, self.ranks = args, ranks
        stop = StopSignal()
        self.parts, self.state = prepare(stage, args, ranks)
        self.plain = copy.deepcopy(self.parts.model) if keeps_plain else None
        keep_features(args, ranks, self.parts, self.state.paths)
        self.state.engine = make_engine(self.state, None)
        self.run: Run = make_run(self.state, self.parts, Metrics(active=False), stop)
        self.run.engine.model.train()
        self._shares = self._endless()

    @property
    def pad(self) -> int:
        """The id of the padding token."""
        return int(self.parts.tokenizer.pad_token_id)

    def _endless(self) -> Iterator[Share]:
        epoch = 0
        while True:
            yield from shares_of(self.run.batches(epoch, 0), self.args.accumulation_steps)
            epoch += 1

    def _step(self) -> Share:
        share = next(self._shares)
        self.run.progress.samples_in_epoch = 0
        train_step(self.run, share)
        return share

    def round(self, num_steps: int) -> Round:
        for _ in range(UNTIMED_STEPS):
            self._step()
        wait_for(self.ranks.device)
        started_s = time.perf_counter()
        shares = [self._step() for _ in range(num_steps)]
        wait_for(self.ranks.device)
        seconds = time.perf_counter() - started_s
        batches = [batch for share in shares for batch in share.batches]
        return Round(
            seconds,
            wait_s=sum(share.wait_s for share in shares),
            steps=num_steps,
            samples=sum(batch.num_samples for batch in batches),
            tokens=sum(batch.num_tokens for batch in batches),
            padded_tokens=sum(batch.inputs["input_ids"].numel() for batch in batches),
        )

    def phases(self, num_steps: int) -> dict[str, float]:
        """Share of each phase in the time of some steps."""
        clock = PhaseClock(self.ranks.device)
        for _ in range(UNTIMED_STEPS):
            self._step()
        with clock.watching(self.run.engine):
            started_s = time.perf_counter()
            wait_s = sum(self._step().wait_s for _ in range(num_steps))
            wait_for(self.ranks.device)
            return clock.shares(time.perf_counter() - started_s, wait_s=wait_s)

    def flop(self, num_steps: int) -> dict[str, float]:
        """Floating-point operations of a step, the mean over the next ones."""
        return count_flop(self._step, num_steps=num_steps)

    def close(self) -> None:
        """End the data workers."""
        self._shares.close()  # type: ignore[attr-defined]  # it is a generator


class PlainRun:
    """The same stage as the original programs train it: float32, every sample padded to
    `--max_seq_len`, the tower at every step, logits of every position, an optimizer that is not
    fused.

    Args:
        model: a float32 copy of the model before its first step.
    """

    def __init__(self, model: MiniMindVLM, args: TrainArgs, dataset: VLMDataset, pad: int):
        self.model, self.args = model.train(), args
        if args.gradient_checkpointing:
            model.activation_checkpointing_disable()
        self.dataset = copy.copy(dataset)
        self.dataset.features = None
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, foreach=False)
        self._batches = self._endless(partial(pad_to, args.max_seq_len, pad))

    def _endless(self, collate: Any) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            self.dataset,
            batch_size=self.args.batch_size,
            shuffle=True,
            collate_fn=collate,
            num_workers=self.args.num_workers,
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        while True:
            yield from loader

    def _step(self) -> int:
        """One optimizer step; returns its samples."""
        num_samples = 0
        for _ in range(self.args.accumulation_steps):
            batch = next(self._batches)
            ids, labels, pixels = (
                batch[name].to(self.model.device) for name in ("ids", "labels", "pixels")
            )
            logits = self.model(ids, pixel_values=pixels, is_right_padded=True).logits  # (B, T, V)
            losses = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
            )
            mask = (labels[:, 1:] != IGNORE_INDEX).flatten()
            ((losses * mask).sum() / mask.sum() / self.args.accumulation_steps).backward()
            num_samples += len(ids)
        limit = self.args.grad_clip or float("inf")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return num_samples

    def round(self, num_steps: int) -> Round:
        self._step()
        wait_for(self.model.device)
        started_s = time.perf_counter()
        samples = sum(self._step() for _ in range(num_steps))
        wait_for(self.model.device)
        tokens = samples * self.args.max_seq_len
        seconds = time.perf_counter() - started_s
        return Round(seconds, 0.0, num_steps, samples, tokens, tokens)

    def flop(self) -> dict[str, float]:
        return count_flop(self._step)

    def close(self) -> None:
        self._batches.close()  # type: ignore[attr-defined]  # it is a generator


def pad_to(length: int, pad: int, samples: list[Sample]) -> dict[str, Tensor]:
    """ids, labels (B, `length`) and pixels (I, 3, S, S)."""

    def rows(name: str, value: int) -> Tensor:
        padded = pad_sequence([getattr(s, name) for s in samples], True, value)
        return F.pad(padded, (0, length - padded.shape[1]), value=value)

    return {
        "ids": rows("input_ids", pad),
        "labels": rows("labels", IGNORE_INDEX),
        "pixels": torch.cat([s.pixel_values for s in samples]),
    }
