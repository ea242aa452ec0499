"""Owns the training loop: the only one. It takes built objects and knows no model or data set.

A step is an optimizer step. Loss and gradient are normalised by the supervised tokens of the
whole step, over micro-steps and ranks, so one update does not depend on how it is split.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch
from torch import Tensor

from trainer.loop.engine import Engine, autocast
from trainer.loop.loading import DataFault
from trainer.loop.schedule import get_lr
from trainer.loop.steps import Share, agree, shares_of
from trainer.loop.validation import validation_loss
from trainer.ranks.group import Ranks, warn
from trainer.ranks.signals import StopSignal
from trainer.tracking.metrics import Metrics, Window, peak_gib

MAX_BAD_STEPS = 5  # non-finite steps in a row before a run stops
MAX_OVERFLOWS = 40  # the same in float16, where the loss scale first has to find its range
MAX_BAD_SHARE = 0.01  # of an epoch's samples
ESTIMATE_STEPS = 5  # steps before the first word on how long it will take
NAMES_SHOWN = 8
RESUMABLE = (
    "; --from_resume 1 goes on with mended pictures or another --max_seq_len, edited records need "
    "a new run from the weight (--from_weight)"
)


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

    def as_dict(self) -> dict:
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


@dataclass
class Run:
    """Everything the loop needs.

    `batches(epoch, start)` gives this rank's batches from global sample `start` on; a batch has
    `inputs_on(device)`, `num_*` counts, `sample_names` and `bad_samples`.
    """

    engine: Engine  # or one with the same face
    ranks: Ranks
    metrics: Metrics
    stop: StopSignal
    batches: Callable[[int, int], Iterable]
    val_batches: Callable[[], Iterable] | None
    save: Callable[[], None]
    num_samples: int
    args: object  # TrainArgs
    progress: Progress = field(default_factory=Progress)
    window: Window = field(default_factory=Window)
    pending: list[StepResult] = field(default_factory=list)  # whose flags were not read yet
    bad_in_a_row: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    started_samples: int = 0
    steps_done: int = 0  # by this process
    is_stopping: bool = False  # all ranks agree to
    is_warned: bool = False  # of steps without a gradient

    @property
    def samples_per_step(self) -> int:
        return self.args.batch_size * self.args.accumulation_steps * self.ranks.world_size

    @property
    def device(self) -> torch.device:
        return self.ranks.device


def train(run: Run) -> bool:
    """Train to the end of the last epoch, or to a stop signal.

    Returns:
        Whether the run is complete; what it did is saved in any case.
    Raises:
        ValueError: too many non-finite steps or bad samples, or validation data without a usable
            one. State and weights are saved first.
        DataFault: a rank could not have its next batch; saved as well.
    """
    run.started_samples = run.progress.samples
    if run.stop.adopt(run.ranks.host_sum(run.stop.votes())):
        return False  # stopped before the first step: there is nothing to save
    while run.progress.epoch < run.args.epochs:
        if not train_epoch(run, run.progress.epoch):
            if run.steps_done:
                run.save()
            return False
        if run.val_batches is not None:
            if run.steps_done:
                run.save()  # as an epoch still to be validated, which a resumed run does first
            if run.is_stopping or not report_validation(run):
                return False
        run.progress.epoch += 1
        run.progress.samples_in_epoch = run.progress.bad_samples_in_epoch = 0
        run.save()
        if run.is_stopping and run.progress.epoch < run.args.epochs:
            return False
    return True


def train_epoch(run: Run, epoch: int) -> bool:
    """Train what is left of an epoch; False if a stop signal ended it early."""
    run.engine.model.train()
    run.window = Window()
    batches = run.batches(epoch, run.progress.samples_in_epoch)
    with closing(shares_of(batches, run.args.accumulation_steps)) as shares:
        return all(train_step(run, share) for share in shares)


def train_step(run: Run, share: Share) -> bool:
    """Take a step, and log and save what is due; False if a stop signal ends the epoch early."""
    progress = run.progress
    run.window.wait_s += share.wait_s
    counts = count_step(run, share)
    run.is_stopping = counts["stop"]
    if not counts["has_data"]:
        check_finite(run)
        return False
    check_bad_samples(run, share.batches, counts)
    result = optimizer_step(run, share.batches, counts)
    progress.samples += result.samples
    progress.samples_in_epoch += result.samples
    progress.truncated_samples += counts["truncated"]
    progress.step += 1
    run.steps_done += 1
    run.window.add(result)
    run.pending.append(result)
    run.metrics.advance(result.samples)
    is_last = progress.samples_in_epoch >= run.num_samples
    if progress.step % run.args.log_interval == 0 or is_last:
        log_window(run)
    elif run.device.type == "cpu":
        check_finite(run)
    if run.steps_done == ESTIMATE_STEPS:
        report_estimate(run)
    if run.is_stopping and not is_last:
        check_finite(run)
        return False
    if progress.step % run.args.save_interval == 0 and not is_last:
        check_finite(run)
        run.save()
    return True


def count_step(run: Run, share: Share) -> dict[str, int]:
    """Sums over micro-steps and ranks, known before the forward pass; and whether to stop.

    Raises:
        DataFault: a rank cannot have its data; what was done so far is saved.
    """
    names = ("samples", "tokens", "supervised", "sequences", "truncated")
    own = [sum(getattr(b, f"num_{name}") for b in share.batches) for name in names]
    own.append(sum(len(b.bad_samples) for b in share.batches))
    try:
        agreed = agree(share, run.ranks, run.stop, own)
    except DataFault as fault:
        if not run.steps_done:
            raise
        check_finite(run)
        run.save()
        fault.args = (f"{fault}; saved at step {run.progress.step}: go on with --from_resume 1",)
        raise
    counts = dict(zip((*names, "bad"), map(int, agreed.sums), strict=True))
    return counts | {"stop": agreed.is_stopping, "has_data": agreed.has_data}


def optimizer_step(run: Run, micro_batches: list, counts: dict[str, int]) -> StepResult:
    """One update. A non-finite loss or gradient leaves weights and optimizer as they are."""
    lr = get_lr(
        run.progress.samples + counts["samples"],
        run.args.epochs * run.num_samples,
        run.args.learning_rate,
    )
    if run.progress.step < run.args.warmup_steps:
        lr *= (run.progress.step + 1) / run.args.warmup_steps
    for group in run.engine.optimizer.param_groups:
        group["lr"] = lr
    sums = torch.zeros(2, device=run.device)
    is_finite = []
    world_size = run.ranks.world_size  # engines average over ranks: undo that
    for i, batch in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        with run.engine.micro_step(is_last=is_last):
            with autocast(run.device, run.args.dtype):
                output = run.engine.model(**batch.inputs_on(run.device))
            loss_sum = output.loss * batch.num_supervised
            aux_sum = output.aux_loss * batch.num_sequences
            loss = loss_sum / max(counts["supervised"], 1) + aux_sum / max(counts["sequences"], 1)
            run.engine.backward(loss * world_size)
        own = torch.stack((loss_sum, aux_sum)).detach()
        is_finite.append(own.isfinite().all())
        sums += own
    sums = run.ranks.device_sum(sums)
    grad_norm, is_bad = run.engine.step(sums, is_empty=not counts["supervised"])
    return StepResult(
        samples=counts["samples"],
        tokens=counts["tokens"],
        supervised=counts["supervised"],
        sequences=counts["sequences"],
        loss_sum=sums[0],
        aux_sum=sums[1],
        grad_norm=grad_norm,
        is_bad=is_bad,
        is_finite=torch.stack(is_finite),
        sample_names=[b.sample_names for b in micro_batches],
    )


def check_finite(run: Run) -> None:
    """Read the flags of the steps since the last look; report and count those left out."""
    if not run.pending:
        return
    flags = torch.stack([result.is_bad for result in run.pending]).tolist()
    pending, run.pending = run.pending, []
    limit = MAX_OVERFLOWS if run.args.dtype == "float16" else MAX_BAD_STEPS
    first_step = run.progress.step - len(pending) + 1
    for step, (flag, result) in enumerate(zip(flags, pending, strict=True), first_step):
        run.bad_in_a_row = run.bad_in_a_row + 1 if flag else 0
        if not flag:
            continue
        run.progress.skipped_steps += 1
        shown = suspects(run, result)
        run.metrics.line(f"step {step} left out: loss or gradient not finite; samples: {shown}")
        if run.bad_in_a_row >= limit:
            message = (
                f"stopped at step {step}: {run.bad_in_a_row} steps in a row were not finite, the "
                f"last on samples {shown}; the weights are as they were before them: lower "
                "--learning_rate, use --dtype bfloat16 or float32, or look at these samples"
            )
            try:
                run.save()
            except (ValueError, OSError) as error:
                message += f" (and saving failed: {error})"
            raise ValueError(message)


def suspects(run: Run, result: StepResult) -> str:
    """The samples of all ranks' micro-steps whose loss was not finite, every one; or, where only
    the gradient was not, some of those that it came from."""
    is_finite = result.is_finite.tolist()
    names = [(name, ok) for group, ok in zip(result.sample_names, is_finite, strict=True)
             for name in group]  # fmt: skip
    names = [pair for of_rank in run.ranks.gather(names) for pair in of_rank]
    guilty = [name for name, ok in names if not ok]
    more = ", ..." if not guilty and len(names) > NAMES_SHOWN else ""
    return ", ".join(guilty or [name for name, _ in names[:NAMES_SHOWN]]) + more


def check_bad_samples(run: Run, micro_batches: list, counts: dict[str, int]) -> None:
    """Show and count the samples that cannot be used; stop where the policy says so.

    It stops before the step, so that a resumed run takes the same samples again: once their
    pictures are mended, or --max_seq_len is raised, none of them is lost.
    """
    progress = run.progress
    if not counts["bad"]:
        return
    reasons = [bad.reason for batch in micro_batches for bad in batch.bad_samples]
    reasons = [reason for of_rank in run.ranks.gather(reasons) for reason in of_rank]
    num_bad = progress.bad_samples_in_epoch + counts["bad"]
    message = None
    if run.args.on_bad_sample == "error":
        message = f"{reasons[0]} (--on_bad_sample skip goes on without it)"
    elif num_bad > MAX_BAD_SHARE * run.num_samples:
        message = too_many_bad(num_bad, run.num_samples, reasons[-1]) + RESUMABLE
    if message:
        if run.steps_done:
            run.save()
        raise ValueError(message)
    for reason in reasons:
        run.metrics.line(f"sample left out: {reason}")
    progress.bad_samples += counts["bad"]
    progress.bad_samples_in_epoch = num_bad


def too_many_bad(num_bad: int, num_records: int, last_reason: str) -> str:
    """The message for more bad samples than a run may leave out."""
    return (
        f"{num_bad} of {num_records} samples cannot be used, more than {MAX_BAD_SHARE:.0%}; "
        f"the last: {last_reason}; mend the data or the paths"
    )


def log_window(run: Run) -> None:
    """Print and write what happened since the last line, and begin a new window."""
    check_finite(run)
    progress, args = run.progress, run.args
    figures = run.window.read(run.device)
    if not run.window.has_gradient and not run.is_warned:
        run.is_warned = True
        warn_of_no_gradient(run)
    run.window = Window()
    lr = run.engine.optimizer.param_groups[0]["lr"]
    num_steps = -(-run.num_samples // run.samples_per_step)
    step_in_epoch = -(-progress.samples_in_epoch // run.samples_per_step)
    loss = "-" if figures["loss"] is None else f"{figures['loss']:.4f}"
    aux = f" aux_loss:{figures['aux_loss']:.4f}" if figures["aux_loss"] else ""
    run.metrics.line(
        f"Epoch:[{progress.epoch + 1}/{args.epochs}]({step_in_epoch}/{num_steps}) loss:{loss}{aux} "
        f"lr:{lr:.3e} tok/s:{figures['tokens_per_s']:.0f} eta:{time_left(run)}"
    )
    head = {"step": progress.step, "epoch": progress.epoch + 1, "samples": progress.samples}
    tail = {"skipped_steps": progress.skipped_steps, "bad_samples": progress.bad_samples}
    run.metrics.write(head | {"lr": lr} | figures | tail)


def warn_of_no_gradient(run: Run) -> None:
    """Say, once a run, that the steps of a whole log window taught nothing."""
    trained = [n for n, p in run.engine.model.named_parameters() if p.requires_grad]
    names = ", ".join(trained[:NAMES_SHOWN]) + (", ..." if len(trained) > NAMES_SHOWN else "")
    warn(
        f"no gradient at all reached what trains ({names}) in the steps up to "
        f"{run.progress.step}: their samples do not use it, as those without an image do not use "
        "the projection; see --trainable, --freeze_llm and the data"
    )


def time_left(run: Run) -> str:
    """What remains of the run at the pace so far, as h:mm:ss."""
    done = run.progress.samples - run.started_samples
    left = run.args.epochs * run.num_samples - run.progress.samples
    elapsed_s = time.perf_counter() - run.started_s
    return str(timedelta(seconds=round(left * elapsed_s / max(done, 1))))


def report_estimate(run: Run) -> None:
    """After the first steps: how long the run will take, and what it holds."""
    run.metrics.line(
        f"estimate after {ESTIMATE_STEPS} steps: {time_left(run)} to go, "
        f"peak memory {peak_gib(run.device):.2f} GiB"
    )


def report_validation(run: Run) -> bool:
    """Measure, print and write the validation loss; False if a stop signal came first."""
    started_s = time.perf_counter()
    found = validation_loss(
        run.engine,
        run.val_batches(),
        ranks=run.ranks,
        stop=run.stop,
        dtype=run.args.dtype,
        say=run.metrics.line,
    )
    if found is None:
        run.is_stopping = True
        return False
    loss, num_tokens, num_bad = found
    progress = run.progress
    left_out = f", {num_bad} sample(s) left out" if num_bad else ""
    run.metrics.line(
        f"Epoch:[{progress.epoch + 1}/{run.args.epochs}] val_loss:{loss:.4f} "
        f"({num_tokens} supervised tokens{left_out})"
    )
    run.metrics.write(
        {"step": progress.step, "epoch": progress.epoch + 1, "val_loss": loss,
         "val_tokens": num_tokens, "val_s": time.perf_counter() - started_s}
    )  # fmt: skip
    return True
