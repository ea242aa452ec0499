"""Owns what a run saves and resumes: the training state, the weight, and what must not change."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from model.vlm_processor import tokenizer_sha256
from model.weights import describe_model, save_weights
from trainer.build import Parts
from trainer.report import RunPaths, versions
from trainer.train_args import Stage, TrainArgs
from trainer.train_loop import Progress
from trainer.trainer_utils import (
    Logger,
    Ranks,
    is_main_process,
    rng_state,
    set_rng_state,
    trained_state,
    vlm_checkpoint,
    warn,
)


@dataclass
class RunState:
    """Model, optimizer and progress of a run, and the files that hold them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    ranks: Ranks
    args: TrainArgs
    paths: RunPaths
    metadata: dict  # what the weight says of itself
    identity: dict  # what a state and the run that resumes it must share
    is_continued: bool = False  # the state on disk is this run's own

    @property
    def old_state(self) -> Path:
        """Where the state of an earlier run goes that this one does not continue."""
        return self.paths.state.with_name(self.paths.state.name + ".old")

    def start(self) -> bool:
        """Resume if asked to and possible, else begin afresh; True if resumed."""
        if self.args.from_resume:
            self.is_continued = self.resume()
        elif self.paths.state.is_file():
            warn(
                f"{self.paths.state} is the state of an earlier run; this run does not continue it "
                f"(--from_resume 1 does) and moves it to {self.old_state.name} when it first saves"
            )
        return self.is_continued

    def save(self) -> None:
        """Write state and weight (in this order: the state is what nothing else can replace)."""
        failure = None
        try:
            if is_main_process():
                self._write()
        except (ValueError, OSError) as error:
            failure = error
        is_failed = self.ranks.host_sum([float(failure is not None)])[0]  # all wait for the writer
        if failure is not None:
            raise failure
        if is_failed:
            raise ValueError("the main process could not save; see its message")

    def _write(self) -> None:
        if not self.is_continued and self.paths.state.is_file():
            os.replace(self.paths.state, self.old_state)  # another run's: kept once
        self.is_continued = True
        about = {"args": self.args.as_text(), "versions": versions()}
        state = {
            "model": trained_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.as_dict(),
            "rng": rng_state(self.ranks.device),
            "world_size": self.ranks.world_size,
        }
        vlm_checkpoint(self.paths.state, state | about, identity=self.identity)
        about["step"] = self.progress.step
        save_weights(self.model, self.paths.weight, self.metadata | about)

    def resume(self) -> bool:
        """Go back to where the state was saved; False if there is none.

        Raises:
            ValueError: the state is unreadable, or of another run (the difference is named).
        """
        state = vlm_checkpoint(self.paths.state, identity=self.identity)
        if state is None:
            Logger(f"--from_resume: no state at {self.paths.state}, so this run starts afresh")
            return False
        self.model.load_state_dict(state["model"], strict=False)  # the identity holds the names
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty unless it was saved in float16
            self.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"], self.ranks.device)
        self.progress = Progress(**state["progress"])
        Logger(
            f"resumed {self.paths.state} at step {self.progress.step}, epoch "
            f"{self.progress.epoch + 1}, sample {self.progress.samples_in_epoch}"
        )
        report_changes(state["args"], self.args.as_text())
        return True


def report_changes(before: dict, now: dict) -> None:
    """Name the arguments that differ from those the state was saved with."""
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name] and name not in ("from_resume", "local_rank"):
            Logger(f"  --{name} was {before[name]}, now {now[name]}")


def describe_run(
    stage: Stage, args: TrainArgs, parts: Parts, *, trained: list[str]
) -> tuple[dict, dict]:
    """The weight's metadata, and the identity that a state and its run share."""
    sha256 = tokenizer_sha256(parts.tokenizer)
    metadata = describe_model(parts.model, tokenizer_sha256=sha256) | {"stage": stage.name}
    identity = {
        "stage": stage.name,
        "data": parts.dataset.fingerprint[:16],
        "tokenizer": sha256[:16],
        "vision tower": (metadata["vision_tower_sha256"] or "")[:16],
        "model": {k: v for k, v in metadata["config"].items() if k != "image_ids"},
        "trained parameters": trained,
        "seed": args.seed,
        "max_seq_len": args.max_seq_len,
    }
    return metadata, identity
