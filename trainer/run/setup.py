"""Owns the order of a run: flags -> parts, checks, optimizer, state -> the loop -> report."""

import os
import signal
import sys
import traceback
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.machine.compiling import check_compiler, compile_modules
from model.machine.device import out_of_memory_line, training_dtype
from model.model_vlm import MiniMindVLM
from trainer.loop import zero_engine as zero
from trainer.loop.engine import Engine, lighten_tower, wrap_for_ranks
from trainer.loop.loading import DataFault
from trainer.loop.loop_state import Progress, Run
from trainer.loop.optimizers import make_optimizer, set_trainable
from trainer.loop.randomness import setup_seed
from trainer.loop.sample_order import samples_per_epoch
from trainer.loop.train_loop import train
from trainer.ranks.group import (
    Logger,
    Ranks,
    init_distributed_mode,
    is_main_process,
    local_ranks,
    warn,
)
from trainer.ranks.signals import CLOSED_OUTPUT, StopSignal
from trainer.ranks.watch import RankWatch, leave_at_once
from trainer.run import preflight
from trainer.run.build import Loaders, Parts, build
from trainer.run.features import keep_features
from trainer.run.identity import metadata_and_identity
from trainer.run.output import surviving_output
from trainer.run.report import INTERRUPTED, print_header, report_end
from trainer.run.self_critical import SelfCritical
from trainer.saving.lock import lock_path, run_lock
from trainer.saving.lora import Lora
from trainer.saving.run_paths import RunPaths, run_paths
from trainer.saving.run_state import RunState
from trainer.tracking.metrics import Console, JsonLog, Metrics
from trainer.tracking.trackers import Tracker, check_tracker, choose_experiment
from trainer.train_args import Stage, TrainArgs, parse_args

LORA_TRAINED = r"\.lora_[AB]\.|^vision_proj\."  # what trains beside adapters
# Flags that may differ between ranks, or that only the main process reads.
FLAGS_OF_A_RANK = {
    "device", "num_workers", "cache_vision_features", "local_rank", "rank_timeout", "from_weight",
    "data_path", "stream_cache_gb",
    "use_wandb", "tracker", "tracker_mode", "wandb_project", "wandb_run_name",
}  # fmt: skip


def main(stage: Stage, argv: list[str] | None, *, description: str) -> int:
    """Run a stage from the command line; returns the exit status.

    An error that a user can correct ends in one line on stderr.
    """
    stop = StopSignal()
    with surviving_output(stop):
        return run_and_report(stage, argv, stop, description=description)


def run_and_report(
    stage: Stage, argv: list[str] | None, stop: StopSignal, *, description: str
) -> int:
    """As `main`, within `surviving_output`."""
    watch = None
    try:
        args = parse_args(stage, argv, description=description)
        watch = RankWatch(timeout_s=args.rank_timeout)
        with watch:
            status = run_stage(stage, args, stop)
    except BaseException as error:
        status = print_reason(error, lost=watch and watch.lost)
        if dist.is_initialized() and dist.get_world_size() > 1:
            if status is None:
                traceback.print_exc()
            leave_at_once(status or 1)
        if status is None:
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return status


def print_reason(error: BaseException, *, lost: str | None) -> int | None:
    """Print an error as one line on stderr; returns the exit status, or None for a bug, which needs
    its traceback.


    Args:
        lost: a message that names the lost rank, if a collective failed for want of one.
    """
    if isinstance(error, KeyboardInterrupt):
        print("left at once; what was saved before is whole", file=sys.stderr, flush=True)
        return INTERRUPTED + signal.SIGINT
    if isinstance(error, BrokenPipeError):
        print_error("nobody reads the output any more; no step was taken yet")
        return INTERRUPTED + CLOSED_OUTPUT
    advice = (
        "give --gradient_checkpointing 1, or lower --batch_size and raise --accumulation_steps by "
        "as much"
    )
    if line := out_of_memory_line(error, advice=advice):
        print_error(line)
    elif isinstance(error, RuntimeError) and lost:
        print_error(lost)
    elif isinstance(error, dist.DistError):
        first_line, *_ = str(error).split("\n")
        print_error(
            f"the ranks lost touch with one another ({first_line}); see the other ranks' "
            "messages, and go on with --from_resume 1"
        )
    elif isinstance(error, (ValueError, OSError)) and not os.environ.get("MINIMIND_TRACEBACK"):
        print_error(error)
    else:
        return None
    return 1


def print_error(error: object) -> None:
    """Print one line on stderr, behind the number of the rank unless it is rank 0."""
    rank = "" if is_main_process() else f"rank {dist.get_rank()}: "
    print(f"{rank}error: {error}", file=sys.stderr, flush=True)


def run_stage(stage: Stage, args: TrainArgs, stop: StopSignal) -> int:
    """Build everything, check it, train, and report; returns the exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data workers are the pool
    ranks = start_device(args)
    setup_seed(args.seed)
    check_tracker(args)
    zero_config = zero.read_config(args, ranks) if args.deepspeed else None
    preflight.check_writable(args.save_dir, flag="--save_dir")
    preflight.check_writable(args.checkpoint_dir, flag="--checkpoint_dir")
    parts, state = prepare(stage, args, ranks)
    with run_lock([lock_path(state.paths.weight), lock_path(state.paths.state)], ranks):
        keep_features(args, ranks, parts, state.paths)
        return resume_and_train(state, parts, stop, zero_config)


def start_device(args: TrainArgs) -> Ranks:
    """Prepare the device and join the other ranks; settles `args.dtype`."""
    ranks = init_distributed_mode(args.device, args.dtype or "bfloat16", tf32=args.tf32)
    usual = training_dtype(ranks.device)
    if args.dtype is None:
        args.dtype = usual
        if usual == "float32":
            Logger("this CPU has no instructions for bfloat16, so training is in float32")
    elif (args.dtype, usual) == ("bfloat16", "float32"):
        warn(
            "--dtype bfloat16: this CPU has no instructions for it and takes many times as long; "
            "leave the flag out to train in float32"
        )
    return ranks


def prepare(stage: Stage, args: TrainArgs, ranks: Ranks) -> tuple[Parts, RunState]:
    """Build model, data and optimizer, print what the run is, and check that it can be.

    Raises:
        ValueError, OSError: what is missing or does not fit.
    """
    lora = read_lora(args)  # a wrong flag is told before anything is loaded
    if args.use_compile:
        check_compiler(ranks.device)
    parts = build(stage, args, device=ranks.device)
    if args.gradient_checkpointing:
        parts.model.activation_checkpointing_enable()
    if args.use_compile:
        compile_modules(parts.model.model.layers)
        Logger("the first step compiles the decoder layers: a minute or more")
    if lora is not None:
        lora.attach(parts.model)
    trained = set_trainable(
        parts.model,
        freeze_llm=args.freeze_llm,
        generation=args.generation,
        trainable=args.trainable if lora is None else LORA_TRAINED,
    )
    paths = run_paths(args, parts.model)
    print_header(stage, args, ranks, parts.model, paths)
    metadata, identity = metadata_and_identity(stage, args, parts, trained=trained)
    preflight.check_ranks_agree(ranks, facts_to_share(args, parts, identity))
    check_run(args, ranks, parts, paths)
    parameters = [(n, p) for n, p in parts.model.named_parameters() if p.requires_grad]
    return parts, RunState(
        model=parts.model,
        optimizer=make_optimizer(parameters, lr=args.learning_rate, kind=args.optimizer),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=args.dtype == "float16"),
        progress=Progress(),
        ranks=ranks,
        args=args,
        paths=paths,
        metadata=metadata,
        identity=identity,
        lora=lora,
        former_identity={"data": parts.dataset.former_fingerprint[:16]},
    )


def read_lora(args: TrainArgs) -> Lora | None:
    """The adapters that the flags ask for."""
    if not args.lora_rank:
        return None
    return Lora(args.lora_rank, tuple(args.lora_targets.replace(" ", "").split(",")))


def resume_and_train(
    state: RunState, parts: Parts, stop: StopSignal, zero_config: dict[str, Any] | None
) -> int:
    """Load the saved state if --from_resume asks for it, and train; returns the exit status."""
    is_resumed = state.start()
    state.engine = make_engine(state, zero_config)
    num_samples = samples_per_epoch(parts.dataset)
    metrics = make_metrics(state, num_samples=num_samples, is_resumed=is_resumed)
    run = make_run(state, parts, metrics, stop)
    return report_end(run, state.paths, train_and_save(run, state))


def facts_to_share(args: TrainArgs, parts: Parts, identity: dict[str, Any]) -> dict[str, str]:
    """What must be the same on every rank: data, model and flags, but not where files lie."""
    data = {
        name: f"{len(dataset)} samples, fingerprint {dataset.fingerprint[:16]}"
        for name, dataset in (("data", parts.dataset), ("validation data", parts.val_dataset))
        if dataset is not None
    }
    flags = {
        f"--{f.name}": getattr(args, f.name)
        for f in fields(args)
        if f.type is not Path and f.name not in FLAGS_OF_A_RANK
    }
    cache = {"feature cache": "off" if args.cache_folder() is None else "on"}
    return {k: str(v) for k, v in (identity | data | flags | cache).items()}


def train_and_save(run: Run, state: RunState) -> bool:
    """Train to the end or to a signal; returns whether the run is complete.

    Pending saves are on disk on return, and also when an error is raised.
    """
    outcome = "crashed"
    with run.stop:
        try:
            is_complete = train(run)
            state.finish()
            outcome = "success" if is_complete else "aborted"
        except DataFault:
            state.finish()  # a launcher ends all ranks as soon as one has left
            raise
        finally:
            state.writer.wait()
            run.metrics.close(outcome=outcome)
    return is_complete


def check_run(args: TrainArgs, ranks: Ranks, parts: Parts, paths: RunPaths) -> None:
    """Checks before the first step; every rank comes to the same result."""
    preflight.check_disk(
        parts.model,
        save_dir=args.save_dir,
        checkpoint_dir=args.checkpoint_dir,
        num_states=paths.num_states(),
    )
    for dataset in filter(None, (parts.dataset, parts.val_dataset)):
        preflight.check_records(dataset, on_bad_sample=args.on_bad_sample, seed=args.seed)
    num_rows = args.batch_size * (1 if parts.rewards is None else 1 + args.num_answers)
    preflight.report_memory(parts.model, ranks, args, num_rows=num_rows)
    num_cores = max(1, (os.cpu_count() or 1) // local_ranks()[1])  # for each rank of a machine
    if args.num_workers > num_cores:
        Logger(f"data workers: {num_cores}, one per CPU core, not {args.num_workers}")
        args.num_workers = num_cores


def make_run(state: RunState, parts: Parts, metrics: Metrics, stop: StopSignal) -> Run:
    """Everything the loop takes."""
    args, ranks = state.args, state.ranks
    loaders = Loaders(args, ranks, stop, parts.tokenizer.pad_token_id, parts.pixel_steps)
    val_batches = None
    if parts.val_dataset is not None:
        val_batches = partial(loaders.validation, parts.val_dataset)
    return Run(
        engine=state.engine,
        objective=make_objective(state, parts, loaders),
        ranks=ranks,
        metrics=metrics,
        stop=stop,
        batches=partial(loaders.train, parts.dataset),
        val_batches=val_batches,
        save=state.save,
        num_samples=samples_per_epoch(parts.dataset),
        source_names=[part.name for part in getattr(parts.dataset, "parts", None) or ()],
        args=args,
        progress=state.progress,
    )


def make_objective(state: RunState, parts: Parts, loaders: Loaders) -> SelfCritical | None:
    """What is learnt from a batch, in a stage with rewards."""
    if parts.rewards is None:
        return None
    model, tokenizer, args = state.model, parts.tokenizer, state.args
    assert isinstance(model, MiniMindVLM)
    return SelfCritical(
        model,
        parts.rewards,
        collate=loaders.collator,
        decode=partial(tokenizer.decode, skip_special_tokens=True),
        end_id=tokenizer.eos_token_id,
        num_answers=args.num_answers,
        answer_weight=args.answer_weight,
        seed=args.seed,
        dtype=args.dtype,
        device=state.ranks.device,
    )


def make_engine(state: RunState, zero_config: dict[str, Any] | None) -> Engine | zero.ZeroEngine:
    """The engine that applies updates to the (resumed) model and optimizer."""
    lighten_tower(state.model, state.args.dtype)  # not before its fingerprint was taken
    if zero_config is not None:
        return zero.ZeroEngine(
            state.model,
            optimizer=state.optimizer,
            ranks=state.ranks,
            config=zero_config,
            adapt=None if state.lora is None else state.lora.attach,
        )
    return Engine(
        wrap_for_ranks(state.model, state.ranks),
        optimizer=state.optimizer,
        scaler=state.scaler,
        grad_clip=state.args.grad_clip,
    )


def make_metrics(state: RunState, *, num_samples: int, is_resumed: bool) -> Metrics:
    """The sinks of the main process; the other ranks are silent."""
    if not is_main_process():
        return Metrics(active=False)
    args, progress = state.args, state.progress
    step = progress.step if is_resumed else None
    sinks: list[Any] = [
        JsonLog(state.paths.metrics, resume_step=step, num_validated=progress.epoch)
    ]
    state.tracker = choose_experiment(args, state.tracker)
    if args.tracker_name() is not None:
        folder = args.save_dir / "tensorboard"
        sinks.append(Tracker(args, state.tracker, resumed_step=step, folder=folder))
    console = Console(total_samples=args.epochs * num_samples, done_samples=progress.samples)
    return Metrics(active=True, console=console, sinks=sinks)
