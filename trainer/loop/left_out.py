"""Owns what training leaves out, and when that ends the run: steps whose loss or gradient is not
finite, and samples that cannot be used."""

import torch

from trainer.loop.loop_state import Run, StepResult
from trainer.loop.steps import MicroBatch

MAX_BAD_STEPS = 5  # non-finite steps in a row before a run stops
MAX_OVERFLOWS = 40  # the same in float16, where the loss scale first has to find its range
MAX_BAD_SHARE = 0.01  # of an epoch's samples
NAMES_SHOWN = 8  # samples, where any of a step may be the cause
RESUMABLE = (
    "; --from_resume 1 goes on with mended pictures or another --max_seq_len, edited records need "
    "a new run from the weight (--from_weight)"
)


def check_finite(run: Run) -> None:
    """Read `is_bad` of the steps since the last call; count and report those left out.

    Raises:
        ValueError: too many in a row; state and weights are saved first.
    """
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
    """Names of the samples behind a step that was not finite, of all ranks.

    Where a loss was not finite: every sample of its micro-step. Where only the gradient was not,
    any sample of the step may be the cause: the first `NAMES_SHOWN` are named.
    """
    is_finite = result.is_finite.tolist()
    groups = zip(result.sample_names, is_finite, strict=True)
    own = [(name, ok) for group, ok in groups for name in group]
    names = [pair for of_rank in run.ranks.gather(own) for pair in of_rank]
    guilty = [name for name, ok in names if not ok]
    more = ", ..." if not guilty and len(names) > NAMES_SHOWN else ""
    return ", ".join(guilty or [name for name, _ in names[:NAMES_SHOWN]]) + more


def check_bad_samples(run: Run, micro_batches: list[MicroBatch], counts: dict[str, int]) -> None:
    """Report and count the samples that cannot be used; stop where `--on_bad_sample` says so.

    It stops before the step, so that a resumed run takes the same samples again: once their
    pictures are mended, or --max_seq_len is raised, none of them is lost.

    Raises:
        ValueError: a bad sample under `error`, too many under `skip`; what was done is saved first.
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
