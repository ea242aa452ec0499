"""Measures the training time that a save costs, when training waits for it and in the background.

    python trainer/benchmark_saving.py
    python trainer/benchmark_saving.py --sizes 512x8 --num_steps 20 --folder /mnt/checkpoints

Text-only models of the given sizes take the same steps without a save, with one that training waits
for, and with one in the background; the rounds alternate, and each figure is a median.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model.machine.device import choose_device, default_dtype, memory_guard, prepare_device
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.options import OnceParser
from trainer.loop.engine import Engine, autocast
from trainer.loop.loop_state import Progress
from trainer.loop.optimizers import make_optimizer
from trainer.ranks.group import Ranks
from trainer.saving.background_writer import state_bytes
from trainer.saving.run_paths import RunPaths
from trainer.saving.run_state import RunState
from trainer.tracking.metrics import GIB
from trainer.train_args import TrainArgs

NO_ROOM = "give smaller --sizes, or a lower --batch_size"
MODES = ("no save", "waiting", "background")


def make_state(size: str, folder: Path, device: torch.device) -> RunState:
    """A model of size `{hidden}x{layers}` with its optimizer, as a run holds them."""
    hidden_size, num_layers = map(int, size.split("x"))
    config = MiniMindConfig(hidden_size=hidden_size, num_hidden_layers=num_layers)
    model = MiniMindForCausalLM(config).to(device).train()
    optimizer = make_optimizer(model.named_parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return RunState(
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        engine=Engine(model, optimizer=optimizer, scaler=scaler, grad_clip=0.0),
        progress=Progress(),
        ranks=Ranks(0, 1, device),
        args=TrainArgs(),
        paths=RunPaths(*(folder / n for n in ("x.pth", "x_resume.pth", "x.jsonl", "x.png"))),
        metadata={"config": {}},
        identity={},
    )


def take_step(state: RunState, input_ids: torch.Tensor) -> None:
    device = input_ids.device
    with autocast(device, default_dtype(device)):
        loss = state.model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    loss.item()  # wait for the device


def time_round(state: RunState, input_ids: torch.Tensor, mode: str, num_steps: int) -> float:
    """Seconds that `num_steps` steps take, with a save after the first unless mode says none."""
    state.is_background = mode == "background"
    started_s = time.perf_counter()
    for step in range(num_steps):
        take_step(state, input_ids)
        if step == 0 and mode != "no save":
            state.save()
    took_s = time.perf_counter() - started_s
    state.finish()
    return took_s


def benchmark(size: str, args: argparse.Namespace, folder: Path) -> None:
    device = prepare_device(choose_device(args.device))
    state = make_state(size, folder, device)
    input_ids = torch.randint(3, 6000, (args.batch_size, args.num_tokens), device=device)
    for mode in MODES:  # warm-up of buffers and kernels
        time_round(state, input_ids, mode, 2)
    taken: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(args.num_rounds):
        for mode in MODES:
            taken[mode].append(time_round(state, input_ids, mode, args.num_steps))
    plain_s, waiting_s, background_s = (median(taken[mode]) for mode in MODES)
    gib = state_bytes(list(state.engine.tensors())) / GIB
    print(
        f"{size}: state {gib:.2f} GiB, step {plain_s / args.num_steps:.3f} s; a save costs "
        f"{waiting_s - plain_s:.2f} s when training waits, {background_s - plain_s:.2f} s in the "
        f"background ({args.num_steps} steps: {plain_s:.1f}, {waiting_s:.1f}, {background_s:.1f} s)"
    )


def main(argv: list[str] | None = None) -> int:
    """Measure each size; returns the exit status."""
    parser = OnceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["512x8", "768x16"])
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--num_rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_tokens", type=int, default=256)
    parser.add_argument("--device", default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where to write the states")
    args = parser.parse_args(argv)
    try:
        for size in args.sizes:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder, memory_guard(NO_ROOM):
                benchmark(size, args, Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
