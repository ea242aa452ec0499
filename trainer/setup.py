"""Owns the wiring of a run: flags -> model, freeze policy, data, optimizer -> the loop."""

import os
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dataset.collate import VLMCollator
from dataset.lm_dataset import VLMDataset
from dataset.records import default_data_paths
from model.inference import attach_tower, placeholder_config
from model.model_vlm import MiniMindVLM
from model.vlm_processor import VLMProcessor, load_tokenizer, tokenizer_sha256
from model.weights import (
    ROOT,
    VISION_PREFIX,
    describe_model,
    find_weight,
    load_weights,
    read_metadata,
    read_weights,
    save_weights,
    weight_config,
    weight_stem,
)
from trainer import preflight
from trainer.metrics import Console, JsonLog, Metrics, SwanLab
from trainer.optim import make_optimizer, set_trainable
from trainer.train_args import Stage, TrainArgs, parse_args
from trainer.train_loop import Progress, Run, train
from trainer.trainer_utils import (
    Logger,
    Ranks,
    StopSignal,
    epoch_order,
    ignore_signals,
    init_distributed_mode,
    is_main_process,
    rank_batches,
    rng_state,
    set_rng_state,
    setup_seed,
    trained_state,
    vlm_checkpoint,
    warn,
)

INTERRUPTED = 128  # plus the signal's number is the exit status of a run that was stopped


def main(stage: Stage, argv: list[str] | None, *, description: str) -> int:
    """Run a stage from the command line; returns the exit status.

    What a user can mend ends in one line on stderr.
    """
    try:
        args = parse_args(stage, argv, description=description)
        with StopSignal() as stop:
            return run_stage(stage, args, stop)
    except KeyboardInterrupt:
        print("left at once; what was saved before is whole", file=sys.stderr, flush=True)
        return INTERRUPTED + signal.SIGINT
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        rank = "" if is_main_process() else f"rank {dist.get_rank()}: "
        print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory ({str(error).split('. ')[0]}); lower --batch_size and raise "
              "--accumulation_steps by as much", file=sys.stderr, flush=True)  # fmt: skip
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_stage(stage: Stage, args: TrainArgs, stop: StopSignal) -> int:
    """Build everything, check it, train, and say what was made."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data workers are the pool
    ranks = init_distributed_mode(args.device)
    setup_seed(args.seed)
    for folder, flag in ((args.save_dir, "--save_dir"), (args.checkpoint_dir, "--checkpoint_dir")):
        preflight.check_writable(folder, flag=flag)
    model, processor = init_vlm_model(args, device=ranks.device)
    names = set_trainable(model, freeze_llm=args.freeze_llm, trainable=args.trainable)
    dataset, val_dataset = make_datasets(stage, args, processor)
    paths = run_paths(args, model)
    print_header(stage, args, ranks, model, paths)
    check_run(args, ranks, model, processor, [d for d in (dataset, val_dataset) if d])

    optimizer = make_optimizer((p for p in model.parameters() if p.requires_grad),
                               lr=args.learning_rate)  # fmt: skip
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.dtype == "float16")
    sha256 = tokenizer_sha256(processor.tokenizer)
    metadata = describe_model(model, tokenizer_sha256=sha256) | {"stage": stage.name}
    identity = {
        "stage": stage.name,
        "data": dataset.records.fingerprint[:16],
        "tokenizer": sha256[:16],
        "vision tower": (metadata["vision_tower_sha256"] or "")[:16],
        "model": {k: v for k, v in metadata["config"].items() if k != "image_ids"},
        "trained parameters": names,
        "seed": args.seed,
        "max_seq_len": args.max_seq_len,
    }
    progress = Progress()
    checkpoint = vlm_checkpoint(paths.state, identity=identity) if args.from_resume else None
    if checkpoint is not None:
        progress = restore(checkpoint, model, optimizer, scaler, ranks)
        Logger(f"resumed {paths.state} at step {progress.step}, epoch {progress.epoch + 1}, "
               f"sample {progress.samples_in_epoch} of {len(dataset)}")  # fmt: skip
        report_changes(checkpoint["args"], args.as_text())
    elif args.from_resume:
        Logger(f"--from_resume: no state at {paths.state}, so this run starts afresh")

    def save() -> None:
        if is_main_process():
            state = {
                "model": trained_state(model),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "progress": progress.as_dict(),
                "rng": rng_state(ranks.device),
                "args": args.as_text(),
                "versions": versions(),
                "world_size": ranks.world_size,
            }
            vlm_checkpoint(paths.state, state, identity=identity)
            about = {"step": progress.step, "args": args.as_text(), "versions": versions()}
            save_weights(model, paths.weight, metadata | about)
        ranks.barrier()

    metrics = make_metrics(args, paths, ranks, progress, len(dataset), checkpoint is not None)
    pad = processor.tokenizer.pad_token_id
    run = Run(
        model=wrap_for_ranks(model, ranks),
        optimizer=optimizer,
        scaler=scaler,
        ranks=ranks,
        metrics=metrics,
        stop=stop,
        batches=partial(train_loader, dataset, args, ranks, pad),
        val_batches=partial(val_loader, val_dataset, args, ranks, pad) if val_dataset else None,
        save=save,
        num_samples=len(dataset),
        args=args,
        progress=progress,
    )
    try:
        is_complete = train(run)
    finally:
        metrics.close()
    return report_end(run, paths, is_complete)


@dataclass(frozen=True)
class RunPaths:
    """What a run writes."""

    weight: Path
    state: Path
    metrics: Path


def run_paths(args: TrainArgs, model: MiniMindVLM) -> RunPaths:
    config = model.config
    stem = weight_stem(args.save_weight, hidden_size=config.hidden_size, use_moe=config.use_moe)
    return RunPaths(
        weight=args.save_dir / f"{stem}.pth",
        state=args.checkpoint_dir / f"{stem}_resume.pth",
        metrics=args.save_dir / f"{stem}_metrics.jsonl",
    )


def init_vlm_model(args: TrainArgs, *, device: torch.device) -> tuple[MiniMindVLM, VLMProcessor]:
    """The model of the flags, with the weights of `--from_weight`, and its processor.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, and what to do.
    """
    flags = {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "use_moe": args.use_moe,
        "keep_cls": args.keep_cls,
        "image_special_token": args.image_special_token,
    }
    path, state, metadata = None, None, {}
    fields = {k: v for k, v in flags.items() if v is not None}
    if args.from_weight != "none":
        path = find_weight(
            args.from_weight,
            save_dir=args.save_dir,
            hidden_size=args.hidden_size,
            use_moe=args.use_moe,
        )
        state, metadata = read_weights(path), read_metadata(path)
        fields = weight_config(state, path=path, flags=flags)
    tokenizer = load_tokenizer(
        args.tokenizer_path, expected_sha256=metadata.get("tokenizer_sha256")
    )
    model = MiniMindVLM(placeholder_config(fields, tokenizer, args.vision_model_path))
    preflight.check_special_tokens(tokenizer, vocab_size=model.config.vocab_size)
    if state is not None:
        had_projection = load_weights(model, state, path=path, may_lack_projection=True)
        Logger(f"weights: {path}" + ("" if had_projection else " (a new projection is learnt)"))
        if "tokenizer_sha256" not in metadata:  # else it was compared already
            preflight.check_tokenizer_fits(model, tokenizer, weight=path)
    attach_tower(model, args.vision_model_path, metadata=metadata, path=path or Path("none"))
    model.to(device)
    return model, VLMProcessor(tokenizer, model.image_processor, config=model.config)


def make_datasets(
    stage: Stage, args: TrainArgs, processor: VLMProcessor
) -> tuple[VLMDataset, VLMDataset | None]:
    """Training and validation data; paths that are not given are the default ones."""
    data_path, images_path = args.data_path, args.images_path
    if data_path is None:
        kind = "multi" if args.use_multi_image else stage.data_kind
        data_path, default_images = default_data_paths(kind)
        images_path = images_path or default_images
    options = {"max_length": args.max_seq_len, "on_bad_sample": "return"}
    dataset = VLMDataset(data_path, images_path, processor, **options)
    if args.val_data_path is None:
        return dataset, None
    return dataset, VLMDataset(args.val_data_path, args.val_images_path, processor, **options)


def check_run(
    args: TrainArgs, ranks: Ranks, model: MiniMindVLM, processor: VLMProcessor, datasets: list
) -> None:
    """What is knowable before the first step; every rank comes to the same answer."""
    preflight.check_disk(model, save_dir=args.save_dir, checkpoint_dir=args.checkpoint_dir)
    for dataset in datasets:
        preflight.check_records(dataset, on_bad_sample=args.on_bad_sample)
    num_tokens = min(args.max_seq_len, model.config.num_image_tokens + 64)
    memory = preflight.estimate_memory_gib(model, batch_size=args.batch_size, num_tokens=num_tokens)
    Logger(f"estimated memory: {memory:.1f} GiB on {ranks.device.type} for samples of about "
           f"{num_tokens} tokens")  # fmt: skip
    if args.num_workers > (os.cpu_count() or 1):
        Logger(f"data workers: {os.cpu_count()}, one per CPU core, not {args.num_workers}")
        args.num_workers = os.cpu_count() or 1


def restore(checkpoint: dict, model, optimizer, scaler, ranks: Ranks) -> Progress:
    """Bring a run back to where its state was saved."""
    model.load_state_dict(checkpoint["model"], strict=False)  # the identity holds the names
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    set_rng_state(checkpoint["rng"], ranks.device)
    return Progress(**checkpoint["progress"])


def report_changes(before: dict, now: dict) -> None:
    """Name the arguments that differ from those the state was saved with."""
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name] and name not in ("from_resume", "local_rank"):
            Logger(f"  --{name} was {before[name]}, now {now[name]}")


def wrap_for_ranks(model: MiniMindVLM, ranks: Ranks) -> torch.nn.Module:
    """DDP over several ranks; the frozen tower is not broadcast."""
    if ranks.world_size == 1:
        return model
    named = [*model.named_parameters(), *model.named_buffers()]
    frozen = [n for n, _ in named if n.startswith(VISION_PREFIX)]
    model._ddp_params_and_buffers_to_ignore = frozen
    return DistributedDataParallel(model, forward_sync_buffers=False)


def loader(dataset: VLMDataset, sampler, args: TrainArgs, ranks: Ranks, pad: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=VLMCollator(pad_token_id=pad),
        num_workers=args.num_workers,
        pin_memory=ranks.device.type == "cuda",
        worker_init_fn=ignore_signals,
        # Its own generator: drawing from the global one would make a resumed run differ.
        generator=torch.Generator().manual_seed(args.seed),
    )


def train_loader(
    dataset: VLMDataset, args: TrainArgs, ranks: Ranks, pad: int, epoch: int, start: int
) -> DataLoader:
    """This rank's batches of an epoch from global sample `start` on."""
    order = epoch_order(len(dataset), seed=args.seed, epoch=epoch)
    sampler = rank_batches(order, start=start, batch_size=args.batch_size, ranks=ranks)
    return loader(dataset, sampler, args, ranks, pad)


def val_loader(dataset: VLMDataset, args: TrainArgs, ranks: Ranks, pad: int) -> DataLoader:
    """This rank's share of the validation data, in file order."""
    order = epoch_order(len(dataset), seed=0, epoch=0)
    order.sort()
    sampler = rank_batches(order, start=0, batch_size=args.batch_size, ranks=ranks)
    return loader(dataset, sampler, args, ranks, pad)


def make_metrics(
    args: TrainArgs, paths: RunPaths, ranks: Ranks, progress: Progress, num_samples: int,
    is_resumed: bool,
) -> Metrics:  # fmt: skip
    """The sinks of the main process; the other ranks are silent."""
    if not is_main_process():
        return Metrics(active=False)
    sinks: list = [JsonLog(paths.metrics, resume_step=progress.step if is_resumed else None)]
    if args.use_wandb:
        sinks.append(SwanLab(project=args.wandb_project, name=args.wandb_run_name,
                             config=args.as_text()))  # fmt: skip
    console = Console(total_samples=args.epochs * num_samples, done_samples=progress.samples)
    return Metrics(active=True, console=console, sinks=sinks)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass that a safe load refuses
        "transformers": transformers.__version__,
    }


def git_state() -> str:
    """Commit of this repository, "+" if files changed since; or that there is none."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()  # fmt: skip

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def print_header(
    stage: Stage, args: TrainArgs, ranks: Ranks, model: MiniMindVLM, paths: RunPaths
) -> None:
    """What a reader of the log needs in order to repeat the run."""
    device = str(ranks.device)
    if ranks.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(ranks.device)})"
    Logger(f"MiniMind-V {stage.name} | git {git_state()} | "
           + " ".join(f"{k} {v}" for k, v in versions().items()))  # fmt: skip
    Logger(f"device {device}, {torch.get_num_threads()} CPU threads, {ranks.world_size} rank(s)")
    Logger("arguments: " + " ".join(f"--{k} {v}" for k, v in args.as_text().items()))
    preflight.report_parameters(model)
    Logger(f"writes {paths.weight}, {paths.state}, {paths.metrics}")


def report_end(run: Run, paths: RunPaths, is_complete: bool) -> int:
    """Say how the run ended; returns the exit status."""
    progress = run.progress
    if progress.bad_samples:
        warn(f"{progress.bad_samples} sample(s) were left out, see the lines above")
    if progress.truncated_samples:
        warn(f"{progress.truncated_samples} sample(s) were cut at {run.args.max_seq_len} tokens; "
             "raise --max_seq_len to keep them whole")  # fmt: skip
    if progress.skipped_steps:
        warn(f"{progress.skipped_steps} step(s) were left out: loss or gradient not finite")
    if not is_complete:
        Logger(f"stopped at step {progress.step}, state saved; go on with --from_resume 1")
        return INTERRUPTED + (run.stop.signum or 0)
    Logger(f"done: {paths.weight}")
    return 0
