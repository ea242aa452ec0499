"""Owns what a run saves and resumes: the training state and the weight."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.machine.atomic_file import remove_leftovers
from model.weights.metadata import read_metadata
from model.weights.saving import save_weights
from trainer.loop.loop_state import AnyEngine, Progress
from trainer.loop.randomness import rng_state, seed_rank, set_rng_state
from trainer.ranks.group import Logger, Ranks, is_main_process, launch_token, warn
from trainer.saving.background_writer import BackgroundWriter, Snapshot, spare_bytes, state_bytes
from trainer.saving.lora import Lora
from trainer.saving.run_paths import RunPaths
from trainer.saving.state_file import load_state, old_path, previous_path, save_state
from trainer.tracking.environment import versions
from trainer.tracking.metrics import GIB
from trainer.train_args import TrainArgs


@dataclass
class RunState:
    """Model, optimizer and progress of a run, and the files that hold them.

    Rank 0 reads and writes the files; every rank must call each public method.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    ranks: Ranks
    args: TrainArgs
    paths: RunPaths
    metadata: dict[str, Any]  # written into the weight
    identity: dict[str, Any]  # what a state and the run that resumes it must share
    former_identity: dict[str, Any] = field(default_factory=dict)  # as earlier versions wrote it
    lora: Lora | None = None  # the model has these adapters
    engine: AnyEngine | None = None  # made of model and optimizer once they are resumed
    tracker: dict[str, Any] = field(default_factory=dict)  # which experiment the run writes to
    is_continued: bool = False  # the state on disk is this run's own
    launches: list[str] = field(default_factory=list)  # every `launch_token` of this launch
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)
    snapshot: Snapshot = field(default_factory=Snapshot)
    is_background: bool = True

    def start(self) -> bool:
        """Resume where there is a state, and `--from_resume` or a restart by the launcher asks for
        it; else begin afresh.

        Returns:
            Whether it resumed.
        Raises:
            ValueError: the state cannot be resumed.
        """
        self.launches = sorted(set(filter(None, self.ranks.gather(launch_token()))))
        sees_state = self.ranks.gather(any(map(_is_file, self._state_paths())))
        if any(sees_state) and not sees_state[0]:
            raise ValueError(
                f"rank {sees_state.index(True)} sees a state at {self.paths.state}, but rank 0 "
                "does not; --checkpoint_dir must be a folder that all machines share"
            )
        state: dict[str, Any] | None = None
        failure: Exception | None = None
        try:
            state = self._find_state() if is_main_process() else None
        except (ValueError, OSError) as error:
            failure = error
        if self.ranks.from_first(failure is not None):
            raise failure or ValueError("rank 0 could not resume; see its message")
        self.is_continued = self.ranks.from_first(state is not None)
        if self.is_continued:
            self._restore(state)
        else:
            seed_rank(self.args.seed, samples=0, rank=self.ranks.rank)
        return self.is_continued

    def _state_paths(self) -> list[Path]:
        return [self.paths.state, previous_path(self.paths.state)]

    def _find_state(self) -> dict[str, Any] | None:
        """The state to resume, on rank 0; None begins afresh."""
        if self.args.from_resume:
            state = self._load_state()
            if state is None:
                Logger(f"--from_resume: no state at {self.paths.state}, so this run starts afresh")
            return state
        if not any(map(_is_file, self._state_paths())):
            return None
        if self.launches:
            try:
                state = self._load_state()
            except ValueError:
                state = None  # another run's, which nobody asked to resume
            if state and set(state["launches"]) & set(self.launches):
                Logger("this launch was restarted: it goes on from its own state")
                return state
        warn(
            f"{self.paths.state} is the state of an earlier run; this run does not continue it "
            f"(--from_resume 1 does) and moves it to {old_path(self.paths.state).name} when it "
            "first saves"
        )
        return None

    def _load_state(self) -> dict[str, Any] | None:
        return load_state(
            self.paths.state, identity=self.identity, former_identity=self.former_identity
        )

    def save(self) -> None:
        """Write state and weight, in the background if there is memory for a copy.

        A write that fails prints a warning, leaves the former files whole, and does not end
        training: the next save tries again. The exception is a weight that has diverged.

        Raises:
            ValueError: the save before this one found that the weight has diverged.
        """
        assert self.engine is not None
        failure = self.writer.failure
        is_fatal = isinstance(failure, ValueError)
        reason = str(failure) if is_fatal else None
        of_ranks = self.ranks.gather((rng_state(self.ranks.device), reason))
        fatal = next((reason for _, reason in of_ranks if reason), None)
        if fatal:
            raise ValueError(fatal)
        model, optimizer = self.engine.tensors()  # gathers the shards of all ranks
        if is_main_process():
            self._write(model, optimizer, [rng for rng, _ in of_ranks])

    def finish(self) -> None:
        """Wait until the last save is written.

        Raises:
            ValueError: it failed.
        """
        self.writer.wait()
        failure = self.writer.failure
        reasons = self.ranks.gather(str(failure) if failure else None)
        for rank, reason in enumerate(reasons):
            if reason:
                raise ValueError(reason if rank == self.ranks.rank else "rank 0 could not save")

    def _write(
        self, model: dict[str, Any], optimizer: dict[str, Any], rngs: list[dict[str, Any]]
    ) -> None:
        progress = self.progress.as_dict()
        about: dict[str, Any] = {"args": self.args.as_text(), "versions": versions()}
        state = about | {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "progress": progress,
            "rng": rngs,
            "world_size": self.ranks.world_size,
            "launches": self.launches,
            "tracker": dict(self.tracker),
        }
        self.writer.wait()  # it reads the buffers that the next copy reuses
        self._choose_background(state)
        if self.is_background:
            state = self.snapshot.copy(state)
        self.writer.run(
            lambda: self._write_files(state, about | {"step": progress["step"]}),
            is_background=self.is_background,
        )

    def _write_files(self, state: dict[str, Any], about: dict[str, Any]) -> None:
        """Write the state first: the weight can be made from it, see `_mend_weight`."""
        is_first = not self.is_continued
        save_state(self.paths.state, state, identity=self.identity, is_first=is_first)
        self.is_continued = True
        remove_leftovers(self.paths.weight)
        self._save_weight(state, about)

    def _save_weight(self, state: dict[str, Any], about: dict[str, Any]) -> None:
        """Write the weight of a state; with LoRA the merged one, and the adapters beside it."""
        model = state["model"]
        if self.lora is not None:
            self.lora.save(model, self.paths.adapters)
            model = self.lora.merge(model)
        save_weights(model, self.paths.weight, self.metadata | about)

    def _choose_background(self, state: dict[str, Any]) -> None:
        """On the first save, find out whether there is memory for a copy; warn if not."""
        if self.snapshot.is_used or not self.is_background:
            return
        need, spare = state_bytes(state), spare_bytes()
        if spare is not None and need > spare:
            self.is_background = False
            warn(
                f"a copy of the state takes {need / GIB:.2f} GiB, {spare / GIB:.2f} may be used: "
                "training waits while it saves; raise --save_interval if that costs too much"
            )

    def _restore(self, state: dict[str, Any] | None) -> None:
        """Set model, optimizer, progress and generators to the state (None but on rank 0).

        DDP or DeepSpeed later broadcasts rank 0's weights to the other ranks.
        """
        big = ("model", "optimizer")
        small = {k: v for k, v in (state or {}).items() if k not in big}
        small = self.ranks.from_first(small)
        if state is not None:
            self.model.load_state_dict(
                state["model"], strict=False
            )  # the identity has compared the names
            self.optimizer.load_state_dict(state["optimizer"])
        share_optimizer(self.optimizer, self.ranks)
        if small["scaler"]:  # empty unless it was saved in float16
            self.scaler.load_state_dict(small["scaler"])
        self.progress = Progress(**small["progress"])
        self.tracker = small["tracker"]
        Logger(
            f"resumed {self.paths.state} at step {self.progress.step}, epoch "
            f"{self.progress.epoch + 1}, sample {self.progress.samples_in_epoch}"
        )
        self._restore_generators(small)
        report_changes(small["args"], self.args.as_text(), prefix="--")
        report_changes(small["versions"], versions())
        if state is not None:
            self._mend_weight(state)

    def _restore_generators(self, state: dict[str, Any]) -> None:
        if state["world_size"] == self.ranks.world_size:
            set_rng_state(state["rng"][self.ranks.rank], self.ranks.device)
            return
        seed_rank(self.args.seed, samples=self.progress.samples, rank=self.ranks.rank)
        Logger(
            f"  {state['world_size']} rank(s) before, {self.ranks.world_size} now: the order of "
            "the samples goes on; random numbers begin anew from seed and sample"
        )

    def _mend_weight(self, state: dict[str, Any]) -> None:
        """Write the weight anew if it is not of the state's step: a save may have been cut off
        between the two files."""
        try:
            step = read_metadata(self.paths.weight).get("step")
        except ValueError:
            step = None
        if step == self.progress.step and self.paths.weight.is_file():
            return
        about = {name: state[name] for name in ("args", "versions")} | {"step": self.progress.step}
        self._save_weight(state, about)
        Logger(f"  {self.paths.weight.name} was not of this step and is made anew from the state")


def _is_file(path: Path) -> bool:
    return path.is_file()


def share_optimizer(optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Broadcast rank 0's moments to every rank."""
    if ranks.world_size == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: list[dict[str, Tensor]] = [optimizer.state.get(p, {}) for p in parameters]
    shapes = [{name: (tuple(t.shape), t.dtype) for name, t in of.items()} for of in states]
    shapes = ranks.from_first(shapes)
    for parameter, names in zip(parameters, shapes, strict=True):
        for name, (shape, dtype) in names.items():
            own = optimizer.state[parameter].get(name)
            if own is None:
                own = torch.empty(shape, dtype=dtype, device=parameter.device)
                optimizer.state[parameter][name] = own
            dist.broadcast(own, src=0)


def report_changes(before: dict[str, Any], now: dict[str, Any], *, prefix: str = "") -> None:
    """Print the values that differ from those the state was saved with."""
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name] and name not in ("from_resume", "local_rank"):
            Logger(f"  {prefix}{name} was {before[name]}, now {now[name]}")
