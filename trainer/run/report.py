"""Owns what a run prints of itself: versions, device, parameters, arguments, how it ended."""

import torch
from torch import nn

from trainer.loop.loop_state import Run
from trainer.loop.optimizers import FROZEN, TRAINED_WORDS
from trainer.ranks.group import Logger, Ranks, is_main_process, warn
from trainer.saving.run_paths import RunPaths
from trainer.tracking.curves import write_curves
from trainer.tracking.environment import git_state, versions
from trainer.train_args import Stage, TrainArgs

INTERRUPTED = 128  # plus the signal's number is the exit status of a run that was stopped


def print_header(
    stage: Stage, args: TrainArgs, ranks: Ranks, model: nn.Module, paths: RunPaths
) -> None:
    """Print what a reader of the log needs to repeat the run."""
    device = str(ranks.device)
    if ranks.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(ranks.device)})"
    Logger(
        f"MiniMind-V {stage.name} | git {git_state()} | "
        + " ".join(f"{k} {v}" for k, v in versions().items())
    )
    Logger(f"device {device}, {torch.get_num_threads()} CPU threads, {ranks.world_size} rank(s)")
    if ranks.device.type == "cuda" and args.dtype == "float32" and not args.tf32:
        Logger(
            "float32 products in full, without TF32; --tf32 1 is several times as fast, with 10 "
            "bits of mantissa"
        )
    Logger("arguments: " + " ".join(f"--{k} {v}" for k, v in args.as_text().items()))
    trained = TRAINED_WORDS[FROZEN[args.generation][args.freeze_llm]]
    if stage.data_kind == "text":
        trained = trained.replace("language model and projection", "language model")
    if args.lora_rank:
        trained = f"projection, and adapters of rank {args.lora_rank} on {args.lora_targets}"
    what = f"what --trainable names ({args.trainable})" if args.trainable else trained
    Logger(f"generation {args.generation}; trains: {what}")
    report_parameters(model)
    Logger(f"writes {paths.weight}, {paths.state}, {paths.metrics}")


def report_parameters(model: nn.Module) -> None:
    """Print how many parameters each part has, and how many of them train."""
    groups: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        key = ".".join(parts[:2]) if parts[0] == "model" else parts[0]
        count = groups.setdefault(key, [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    for name, (total, trained) in groups.items():
        Logger(f"  {name:22} {total:>12,} parameters, {trained:>12,} train")


def report_end(run: Run, paths: RunPaths, is_complete: bool) -> int:
    """Print how the run ended; returns the exit status."""
    progress = run.progress
    if progress.bad_samples:
        warn(f"{progress.bad_samples} sample(s) were left out, see the lines above")
    if progress.truncated_samples:
        warn(
            f"{progress.truncated_samples} sample(s) were cut at {run.args.max_seq_len} tokens; "
            "raise --max_seq_len to keep them whole"
        )
    if progress.skipped_steps:
        warn(f"{progress.skipped_steps} step(s) were left out: loss or gradient not finite")
    if is_complete and progress.step and progress.skipped_steps == progress.step:
        warn(
            "no step was applied: the weight is as it was; lower --learning_rate or use --dtype "
            "bfloat16 or float32"
        )
        return 1
    if not is_complete:
        is_saved = progress.samples > run.started_samples
        Logger(
            f"stopped at step {progress.step}, state saved; go on with --from_resume 1"
            if is_saved
            else "stopped before the first step; nothing was written"
        )
        return INTERRUPTED + (run.stop.signum or 0)
    Logger(f"done: {paths.weight}")
    if is_main_process():
        draw_curves(paths)
    return 0


def draw_curves(paths: RunPaths) -> None:
    """The run's curves beside its weight; the run is complete, so nothing here may fail it."""
    try:
        write_curves([paths.metrics], paths.curves)
        Logger(f"curves: {paths.curves}")
    except Exception as error:  # matplotlib missing or broken, the disk full, an odd font
        warn(f"the curves were not drawn ({error}); `python -m trainer.plot` draws them later")
