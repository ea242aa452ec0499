"""Owns which files a run writes."""

from dataclasses import dataclass
from pathlib import Path

from model.model_minimind import MiniMindForCausalLM
from model.weights.file_names import weight_stem
from trainer.tracking.curves import METRICS_SUFFIX
from trainer.train_args import TrainArgs


@dataclass(frozen=True)
class RunPaths:
    """What a run writes."""

    weight: Path
    state: Path
    metrics: Path
    curves: Path

    @property
    def adapters(self) -> Path:
        """The folder of LoRA's adapters."""
        return self.weight.with_name(f"{self.weight.stem}_lora")

    def num_states(self) -> int:
        """How many states of this run are there."""
        return len(list(self.state.parent.glob(self.state.name + "*")))


def run_paths(args: TrainArgs, model: MiniMindForCausalLM) -> RunPaths:
    """The files of a run; the model's size is part of their names."""
    config = model.config
    stem = weight_stem(args.save_weight, hidden_size=config.hidden_size, use_moe=config.use_moe)
    return RunPaths(
        weight=args.save_dir / f"{stem}.pth",
        state=args.checkpoint_dir / f"{stem}_resume.pth",
        metrics=args.save_dir / f"{stem}{METRICS_SUFFIX}",
        curves=args.save_dir / f"{stem}_curves.png",
    )
