"""Owns training on DeepSpeed: its configuration file, and the engine that shards over the ranks.

ZeRO-1 shards AdamW's moments over the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights too.
The configuration file says how to shard; the flags say how to train, as without DeepSpeed. The
training state holds whole tensors, so a run resumes under another stage, another number of ranks,
or without DeepSpeed.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.machine.paths import ROOT
from model.weights.strict_loading import VISION_PREFIX
from trainer.loop.engine import trained_state
from trainer.ranks.group import Ranks, is_main_process, local_ranks
from trainer.train_args import TrainArgs

CONFIG_DIR = ROOT / "trainer" / "configs"
TOWER = VISION_PREFIX.rstrip(".")
MOMENTS = ("exp_avg", "exp_avg_sq")
# Sections that a configuration may have. What decides the numbers is a flag instead.
SECTIONS = {
    "zero_optimization", "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
}  # fmt: skip
FLAGS = {
    "optimizer": "--learning_rate",
    "scheduler": "--learning_rate",
    "gradient_clipping": "--grad_clip",
    "gradient_accumulation_steps": "--accumulation_steps",
    "train_micro_batch_size_per_gpu": "--batch_size",
    "train_batch_size": "--batch_size",
    "bf16": "--dtype",
    "bfloat16": "--dtype",
    "fp16": "--dtype",
    "torch_autocast": "--dtype",
}


def find_config(name: str) -> Path:
    """A configuration file: the path as it stands, else one of ours by its name.

    Raises:
        FileNotFoundError: neither; lists ours.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if (CONFIG_DIR / name).is_file() and path.name == name:
        return CONFIG_DIR / name
    ours = ", ".join(sorted(p.name for p in CONFIG_DIR.glob("*.json")))
    raise FileNotFoundError(f"no --deepspeed configuration {name}; write one, or use ours: {ours}")


def read_config(args: TrainArgs, ranks: Ranks) -> dict[str, Any]:
    """The configuration that DeepSpeed starts with: the file of `--deepspeed`, and the flags.

    Raises:
        FileNotFoundError, ValueError: no such file, not a configuration, or one that sets what a
        flag sets; or this run cannot use DeepSpeed at all.
    """
    path = find_config(args.deepspeed)
    _check_usable(args, ranks)
    try:
        config = _without_auto(json.loads(path.read_text(encoding="utf-8")))
        stage = config.get("zero_optimization", {}).get("stage")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--deepspeed {path} is not a JSON object of settings: {error}") from None
    _check_sections(config, path)
    if stage not in (1, 2, 3):
        raise ValueError(
            f"--deepspeed {path}: zero_optimization.stage is {stage}, not 1, 2 or 3; to hold "
            "everything on every rank, drop --deepspeed"
        )
    config = {key: value for key, value in config.items() if key in SECTIONS}
    # No module counts as safe in low precision: gradients travel in float32, as without DeepSpeed.
    autocast: dict[str, Any] = {
        "enabled": args.dtype != "float32",
        "lower_precision_safe_modules": [],
    }
    if autocast["enabled"]:
        autocast["dtype"] = args.dtype
    from_flags = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": 1,  # the loop counts and normalises micro-steps
        "gradient_clipping": args.grad_clip,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": autocast,
    }
    return {"steps_per_print": None} | config | from_flags


def _check_usable(args: TrainArgs, ranks: Ranks) -> None:
    """Refuse what DeepSpeed cannot do on this machine, or with these flags."""
    if "RANK" not in os.environ:
        raise ValueError(
            "--deepspeed needs a launcher: `deepspeed --num_gpus=1` or `torchrun --nproc_per_node "
            "1` in the place of `python`"
        )
    if ranks.device.type == "cuda" and ranks.device.index != local_ranks()[0]:
        raise ValueError(
            f"--device {args.device}: DeepSpeed takes the GPU of the local rank; choose another by "
            "CUDA_VISIBLE_DEVICES, or drop --deepspeed"
        )
    if args.optimizer != "adamw":
        raise ValueError("--deepspeed shares out AdamW's moments only; drop it, or --optimizer")
    if args.dtype == "float16":
        raise ValueError(
            "--deepspeed does not train in float16; use --dtype bfloat16, or drop --deepspeed"
        )


def _check_sections(config: dict[str, Any], path: Path) -> None:
    """Refuse sections that a flag sets, and those not tested here."""
    for name, value in config.items():
        is_off = isinstance(value, dict) and value.get("enabled") is False
        if name in SECTIONS or name.startswith("_") or is_off:
            continue
        if name in FLAGS:
            raise ValueError(
                f"--deepspeed {path} sets {name}; that is the flag {FLAGS[name]} here: take it "
                'out of the file, or write "auto"'
            )
        raise ValueError(
            f"--deepspeed {path} sets {name}, which does not work here; take it out of the file "
            f"(what works: {', '.join(sorted(SECTIONS))})"
        )


def _without_auto(value: Any) -> Any:
    """Drop entries whose value is "auto": a flag or DeepSpeed's default stands for them."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v != "auto"}
        return {
            k: _without_auto(v)
            for k, v in kept.items()
            if not (isinstance(v, dict) and v.get("enabled") == "auto")
        }
    return value


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device.

    Raises:
        ValueError: it is not installed, or does not start on this machine.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it takes what it finds first
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--deepspeed needs a package that is not installed ({error.name}): pip install "
            f"{error.name}"
        ) from None
    except Exception as error:
        raise ValueError(
            f"DeepSpeed does not start on this machine ({_first_line(error)}); mend its "
            "installation, or drop --deepspeed"
        ) from error
    # On CPUs it would compile a shared-memory all-reduce, for minutes; gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class ZeroEngine:
    """DeepSpeed with the methods of `trainer.loop.engine.Engine`.

    Args:
        optimizer: AdamW over the whole parameters, with the resumed moments, if any. From here on
            it holds this rank's shard.
        config: from `read_config`.
        adapt: gives a new model of the same class the adapters that this one has.
    """

    _adapt: Callable[[nn.Module], None] | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.AdamW,
        ranks: Ranks,
        config: dict[str, Any],
        adapt: Callable[[nn.Module], None] | None = None,
    ):
        deepspeed = load_deepspeed(ranks.device)
        self._gather = deepspeed.zero.GatheredParameters
        self._fragments = deepspeed.utils
        self._ranks, self._adapt = ranks, adapt
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._groups = optimizer.state_dict()["param_groups"]
        self.module = model
        # A rank whose batch has no image does not call the frozen tower, so it must not be sharded
        # (a sharded layer is gathered by all ranks). DeepSpeed does not see a plain attribute.
        self._tower = model._modules.pop(TOWER, None)
        if self._tower is not None:
            object.__setattr__(model, TOWER, self._tower)
        moments = [optimizer.state.get(p, {}) for p in self._parameters]
        optimizer.state.clear()
        # DeepSpeed may take a step on zero gradients as it starts; it must not decay the weights.
        optimizer.found_inf = torch.ones((), device=ranks.device)  # type: ignore[attr-defined]
        try:
            self.model, self._zero, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        except Exception as error:
            raise ValueError(
                f"DeepSpeed could not start with this --deepspeed configuration "
                f"({type(error).__name__}: {_first_line(error)})"
            ) from error
        self.optimizer = optimizer
        self._set_moments(moments)

    def _set_moments(self, moments: list[dict[str, Tensor]]) -> None:
        """Set this rank's shard of the moments: to the saved ones, or to zeros.

        DeepSpeed makes them in the first step, which is too late for a resumed run.
        """
        flats = getattr(self._zero, "single_partition_of_fp32_groups", None)
        is_zero3 = flats is None
        for flat in self._zero.fp32_partitioned_groups_flat if flats is None else flats:
            zeros = {name: torch.zeros_like(flat) for name in MOMENTS}
            step = torch.zeros((), device=flat.device)
            self.optimizer.state[flat] = {"step": step} | zeros
        if not is_zero3:
            self._zero._lazy_init_hp_params_optimizer_state()
        if not any(moments):
            return
        for parameter, saved in zip(self._parameters, moments, strict=True):
            for name in MOMENTS:
                self._fragments.safe_set_full_optimizer_state(parameter, saved[name], name)
        for shard in self.optimizer.state.values():
            shard["step"].copy_(moments[0]["step"])

    def micro_step(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Context of a forward and backward pass; the last one of a step completes its gradient."""
        self.model.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss; DeepSpeed takes its mean over the ranks."""
        self.model.backward(loss)

    def step(self, sums: Tensor, *, is_empty: bool) -> tuple[Tensor, Tensor]:
        """As `Engine.step`. DeepSpeed itself leaves a step out whose gradient is not finite."""
        is_bad = ~torch.isfinite(sums).all()
        found_inf = torch.ones_like(sums[0]) if is_empty else is_bad.float()
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.model.step()
        norm = float("inf") if self._zero.overflow else self.model.get_global_grad_norm()
        grad_norm = torch.as_tensor(norm, device=sums.device)
        return grad_norm, is_bad | ~torch.isfinite(grad_norm)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """As `Engine.evaluating`. Under ZeRO-3 it is a whole copy on every rank: a sharded layer is
        gathered by all ranks, so they would need equally many batches."""
        model = self.module if self.model.zero_optimization_stage() < 3 else self._whole_copy()
        model.eval()
        yield model
        model.train()

    def _whole_copy(self) -> nn.Module:
        device = self._ranks.device
        gpus = [device] if device.type == "cuda" else []  # by default it would fork all GPUs
        with torch.random.fork_rng(devices=gpus), device:
            copy: nn.Module = type(self.module)(self.module.config)
            if self._adapt is not None:
                self._adapt(copy)
        if self._tower is not None:
            copy._modules.pop(TOWER, None)
            object.__setattr__(copy, TOWER, self._tower)
            copy.pixel_steps = self.module.pixel_steps
        with self._gather(list(self.module.parameters())):
            copy.load_state_dict(self.module.state_dict())
        return copy

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `Engine.tensors`, gathered on rank 0's CPU; every rank must call it."""
        with self._gather(list(self.module.parameters())):
            model = _copies(trained_state(self.module)) if is_main_process() else {}
        step = next(iter(self.optimizer.state.values()))["step"].cpu()
        state = {}
        for index, parameter in enumerate(self._parameters):
            full_state = self._fragments.safe_get_full_optimizer_state  # a collective
            whole = {name: full_state(parameter, name) for name in MOMENTS}
            if is_main_process():
                state[index] = {"step": step.clone()} | {n: t.cpu() for n, t in whole.items()}
        lr = self.optimizer.param_groups[0]["lr"]
        return model, {"state": state, "param_groups": [g | {"lr": lr} for g in self._groups]}


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU with storage of their own; tied tensors stay tied."""
    copies: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if tensor.data_ptr() not in copies:
            copies[tensor.data_ptr()] = tensor.detach().to("cpu", copy=True)
    return {name: copies[tensor.data_ptr()] for name, tensor in tensors.items()}
