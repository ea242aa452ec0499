"""Owns what the loop carries from step to step: a run's parts, its progress, a step's figures."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.loop.engine import Engine
from trainer.loop.steps import Batches, MicroBatch
from trainer.loop.zero_engine import ZeroEngine
from trainer.ranks.group import Ranks
from trainer.ranks.signals import StopSignal
from trainer.tracking.metrics import LogWindow, Metrics
from trainer.train_args import TrainArgs

AnyEngine = Engine | ZeroEngine


@dataclass
class Progress:
    """How far a run has come, in global samples of the order."""

    epoch: int = 0
    samples_in_epoch: int = 0
    samples: int = 0
    step: int = 0
    skipped_steps: int = 0
    bad_samples: int = 0
    bad_samples_in_epoch: int = 0
    truncated_samples: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class StepResult:
    """Counts of one step over all ranks, and its figures as tensors on the device."""

    samples: int
    tokens: int
    supervised: int
    sequences: int
    loss_sum: Tensor
    aux_sum: Tensor
    grad_norm: Tensor
    is_bad: Tensor
    is_finite: Tensor  # (micro-steps,) the losses of this rank
    sample_names: list[list[str]]  # of each micro-step
    source_sums: Tensor | None = None  # of a mixture; see source_losses.py


class Objective(Protocol):
    """Makes of a batch what is learnt from it."""

    def __call__(self, batch: Any, epoch: int) -> MicroBatch: ...

    def take_reward(self) -> float | None:
        """The mean reward since the last call, of this rank."""


@dataclass
class Run:
    """Everything the loop needs.

    `batches(epoch, start)` gives this rank's batches from global sample `start` on.
    """

    engine: AnyEngine
    ranks: Ranks
    metrics: Metrics
    stop: StopSignal
    batches: Callable[[int, int], Batches]
    val_batches: Callable[[], Batches] | None
    save: Callable[[], None]
    num_samples: int
    args: TrainArgs
    objective: Objective | None = None  # None: the data's own answers are learnt as they stand
    source_names: list[str] = field(default_factory=list)  # of a mixture
    progress: Progress = field(default_factory=Progress)
    window: LogWindow = field(default_factory=LogWindow)
    pending: list[StepResult] = field(default_factory=list)  # whose `is_bad` is not read yet
    bad_in_a_row: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    started_samples: int = 0
    steps_done: int = 0  # by this process
    is_stopping: bool = False  # all ranks have agreed to stop
    is_warned: bool = False  # of a log window without a gradient

    @property
    def samples_per_step(self) -> int:
        return self.args.batch_size * self.args.accumulation_steps * self.ranks.world_size

    @property
    def device(self) -> torch.device:
        return self.ranks.device
