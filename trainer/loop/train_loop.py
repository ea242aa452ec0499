"""Owns the training loop, the only one. It is handed a model and data, and builds neither.

A step is an optimizer step. Loss and gradient are normalised by the supervised tokens of the
whole step, over micro-steps and ranks, so one update does not depend on how it is split.
"""

import time
from contextlib import closing
from datetime import timedelta

import torch

from model.generations import GENERATIONS
from model.machine.heap import release_free_memory
from trainer.loop.balance import StepBalance
from trainer.loop.engine import autocast
from trainer.loop.left_out import check_bad_samples, check_finite
from trainer.loop.loading import DataFault
from trainer.loop.loop_state import Run, StepResult
from trainer.loop.schedule import get_lr
from trainer.loop.source_losses import loss_sum, source_sums
from trainer.loop.steps import Agreement, MicroBatch, Share, agree, shares_of
from trainer.loop.validation import validation_loss
from trainer.ranks.group import warn
from trainer.tracking.metrics import LogWindow, peak_gib

TRIM_STEPS = 50  # on a CPU, steps after which free memory is given back
ESTIMATE_STEPS = 5  # steps before the first estimate of how long the run will take
NAMES_SHOWN = 8  # parameters in a warning


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
                run.save()  # a run resumed from here validates first
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
    run.window = LogWindow()
    release_free_memory()  # before data workers are forked from this process
    batches = run.batches(epoch, run.progress.samples_in_epoch)
    with closing(shares_of(batches, run.args.accumulation_steps)) as shares:
        return all(train_step(run, share) for share in shares)


def train_step(run: Run, share: Share) -> bool:
    """Take a step, and log and save what is due; False if a stop signal ends the epoch early."""
    progress = run.progress
    run.window.wait_s += share.wait_s
    if run.objective is not None and share.is_whole:
        share.batches = [run.objective(b, progress.epoch) for b in share.batches]
    counts, agreed = count_step(run, share)
    run.is_stopping = agreed.is_stopping
    if not agreed.has_data:
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
    if run.device.type == "cpu" and run.steps_done % TRIM_STEPS == 0:
        release_free_memory()
    if run.steps_done == ESTIMATE_STEPS:
        report_estimate(run)
    if run.is_stopping and not is_last:
        check_finite(run)
        return False
    if progress.step % run.args.save_interval == 0 and not is_last:
        check_finite(run)
        run.save()
    return True


def count_step(run: Run, share: Share) -> tuple[dict[str, int], Agreement]:
    """Counts of a step, summed over micro-steps and ranks before the forward pass, and what the
    ranks agreed on.

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
    return dict(zip((*names, "bad"), map(int, agreed.sums), strict=True)), agreed


def optimizer_step(run: Run, micro_batches: list[MicroBatch], counts: dict[str, int]) -> StepResult:
    """One update. A non-finite loss or gradient leaves weights and optimizer as they are."""
    lr = get_lr(
        run.progress.samples + counts["samples"],
        run.args.epochs * run.num_samples,
        run.args.learning_rate,
        peak=GENERATIONS[run.args.generation].lr_peak,
    )
    if run.progress.step < run.args.warmup_steps:
        lr *= (run.progress.step + 1) / run.args.warmup_steps
    for group in run.engine.optimizer.param_groups:
        group["lr"] = lr
    balance = StepBalance(
        run, micro_batches, num_tokens=counts["tokens"], num_sequences=counts["sequences"]
    )
    num_sources = len(run.source_names)
    sums = torch.zeros(2 + 2 * num_sources, device=run.device)
    is_finite = []
    world_size = run.ranks.world_size  # engines average over ranks: undo that
    for i, batch in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        with run.engine.micro_step(is_last=is_last):
            with autocast(run.device, run.args.dtype):
                inputs = batch.inputs_on(run.device)
                output = run.engine.model(**inputs)
            own_sum = loss_sum(output, inputs, batch)
            aux_sum = balance.aux_sum(output, batch)
            if num_sources:
                sums[2:] += source_sums(output.logits, inputs, batch, num_sources=num_sources)
            del output  # its logits would take memory during the backward pass
            loss = own_sum / max(counts["supervised"], 1) + aux_sum / max(counts["sequences"], 1)
            run.engine.backward(loss * world_size)
        own = torch.stack((own_sum, aux_sum)).detach()
        is_finite.append(own.isfinite().all())
        sums[:2] += own
    sums = run.ranks.device_sum(sums)
    grad_norm, is_bad = run.engine.step(sums[:2], is_empty=not counts["supervised"])
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
        source_sums=sums[2:] if num_sources else None,
    )


def log_window(run: Run) -> None:
    """Print and write what happened since the last line, and begin a new window."""
    check_finite(run)
    progress, args = run.progress, run.args
    figures = run.window.read(run.device, source_names=run.source_names)
    if not run.window.has_gradient and not run.is_warned:
        run.is_warned = True
        warn_of_no_gradient(run)
    run.window = LogWindow()
    if run.objective is not None:
        figures["reward"] = run.objective.take_reward()
    lr = run.engine.optimizer.param_groups[0]["lr"]
    num_steps = -(-run.num_samples // run.samples_per_step)
    step_in_epoch = -(-progress.samples_in_epoch // run.samples_per_step)
    loss = "-" if figures["loss"] is None else f"{figures['loss']:.4f}"
    aux = f" aux_loss:{figures['aux_loss']:.4f}" if figures["aux_loss"] else ""
    if figures.get("reward") is not None:
        loss += f" reward:{figures['reward']:.4f}"
    of_sources = "".join(
        f" {name}:{figures[f'loss/{name}']:.4f}"
        for name in run.source_names
        if figures[f"loss/{name}"] is not None
    )
    run.metrics.line(
        f"Epoch:[{progress.epoch + 1}/{args.epochs}]({step_in_epoch}/{num_steps}) loss:{loss}{aux}"
        f"{of_sources} "
        f"lr:{lr:.3e} tok/s:{figures['tokens_per_s']:.0f} eta:{time_left(run)}"
    )
    head = {"step": progress.step, "epoch": progress.epoch + 1, "samples": progress.samples}
    tail = {"skipped_steps": progress.skipped_steps, "bad_samples": progress.bad_samples}
    run.metrics.write(head | {"lr": lr} | figures | tail)


def warn_of_no_gradient(run: Run) -> None:
    """Warn, once a run, that no step of a whole log window had a gradient."""
    trained = [n for n, p in run.engine.model.named_parameters() if p.requires_grad]
    names = ", ".join(trained[:NAMES_SHOWN]) + (", ..." if len(trained) > NAMES_SHOWN else "")
    warn(
        f"no gradient at all reached what trains ({names}) in the steps up to "
        f"{run.progress.step}: their samples do not use it, as those without an image do not use "
        "the projection; see --trainable, --freeze_llm and the data"
    )


def time_left(run: Run) -> str:
    """Time to the end of the run at the pace so far, as h:mm:ss."""
    done = run.progress.samples - run.started_samples
    left = run.args.epochs * run.num_samples - run.progress.samples
    elapsed_s = time.perf_counter() - run.started_s
    return str(timedelta(seconds=round(left * elapsed_s / max(done, 1))))


def report_estimate(run: Run) -> None:
    """After the first steps: print how long the run will take, and its peak memory."""
    run.metrics.line(
        f"estimate after {ESTIMATE_STEPS} steps: {time_left(run)} to go, "
        f"peak memory {peak_gib(run.device):.2f} GiB"
    )


def report_validation(run: Run) -> bool:
    """Measure, print and log the validation loss; False if a stop signal came first."""
    assert run.val_batches is not None
    started_s = time.perf_counter()
    found = validation_loss(
        run.engine,
        run.val_batches(),
        ranks=run.ranks,
        stop=run.stop,
        dtype=run.args.dtype,
        report=run.metrics.line,
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
    figures = {"val_loss": loss, "val_tokens": num_tokens, "val_s": time.perf_counter() - started_s}
    run.metrics.write({"step": progress.step, "epoch": progress.epoch + 1} | figures)
    return True
