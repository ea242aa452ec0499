"""Offers ranks as real processes, forked from one that has imported everything, so that a launch
takes a second. Kills, files and connections are real.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from support.scripts import free_port

from trainer import train_pretrain_vlm, train_sft_vlm
from trainer.loop import train_loop

CONTEXT = multiprocessing.get_context("forkserver")
# What the programs import, some of it late: each start would pay for it anew.
PRELOADED = (
    "support.rank_group",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_pil_clip",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "pyarrow.parquet",
    "eval_vlm",
    "model.serving.web.page",
)
CONTEXT.set_forkserver_preload(list(PRELOADED))
TESTS = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join((str(TESTS.parent), str(TESTS)))  # for that process
TIMEOUT_S = 900  # generous: machines that run tests are busy


def begin_as_python_does() -> None:
    """Undo what a process inherits from the one it was forked from: its data workers too would be
    forked from a process that first imports everything.
    """
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    torch.set_num_threads(1)


def run_rank(argv: list[str], environment: dict, log: Path, hook) -> None:
    """What one process does: `main` with its output in a file."""
    file = open(log, "ab", buffering=0)  # noqa: SIM115, it stays open as 1 and 2
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    begin_as_python_does()
    if hook is not None:
        hook[0](*hook[1:])
    sys.exit(train_pretrain_vlm.main(argv))


class RankGroup:
    """`world_size` ranks of one run, and the store that a launcher would keep for them.

    Args:
        hook: a function and its arguments that each process calls first.
    """

    def __init__(self, argv: list, folder: Path, *, world_size: int, hook=None, name: str = "run"):
        port = free_port()
        self.store = torch.distributed.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False
        )
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
        }
        self.logs = [folder / f"{name}_{rank}.log" for rank in range(world_size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (list(map(str, argv)), environment, log, hook)
            process = CONTEXT.Process(target=run_rank, args=arguments)
            process.start()
            self.processes.append(process)

    def output(self, rank: int = 0) -> str:
        log = self.logs[rank]
        return log.read_text(errors="replace") if log.exists() else ""

    def wait_for(self, is_so, what: str = "") -> None:
        """Until a condition holds; an error if the ranks end or take too long before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_so():
            assert any(p.is_alive() for p in self.processes), f"ended before {what}: {self.said()}"
            assert time.monotonic() < deadline, f"no {what}: {self.said()}"
            time.sleep(0.005)

    def kill(self, *ranks: int, signum: int = signal.SIGKILL) -> None:
        """Signal some ranks, or all."""
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signum)

    def families(self) -> list[int]:
        """All processes of the ranks: themselves, their data workers and what these started."""
        found = [process.pid for process in self.processes]
        for pid in found:  # grows as children are found
            listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
            found += map(int, listed.stdout.split())
        return found

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[int]:
        """Exit statuses, once all have ended; whoever has not is killed, which is an error."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, p in enumerate(self.processes) if p.is_alive()]
        if late:
            self.kill()
        assert not late, f"ranks {late} still ran after {timeout_s} s: {self.said()}"
        return [p.exitcode for p in self.processes]

    def said(self) -> str:
        """The end of every rank's output."""
        ranks = range(len(self.logs))
        return "\n".join(f"--- rank {rank}\n{self.output(rank)[-1500:]}" for rank in ranks)

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, *_) -> None:
        self.kill(signum=signal.SIGKILL)


def run_ranks(argv: list, folder: Path, *, world_size: int, status: int = 0, **options) -> str:
    """Run a group to its end; returns rank 0's output."""
    with RankGroup(argv, folder, world_size=world_size, **options) as group:
        assert group.wait() == [status] * world_size, group.said()
        return group.output()


def run_main(main, argv: list[str]) -> None:
    """A hook that runs another program than the first stage."""
    sys.exit(main(argv))


def run_sft(argv: list[str]) -> None:
    """A hook that runs the second stage, not the first."""
    sys.exit(train_sft_vlm.main(list(map(str, argv))))


def record_steps(folder: Path, name: str) -> None:
    """Write down which samples every step of this process takes, before it takes them."""
    step = train_loop.optimizer_step
    log = open(folder / f"{name}_{os.environ['RANK']}.steps", "a")  # noqa: SIM115

    def recorded(run, micro_batches, counts):
        names = [name for batch in micro_batches for name in batch.sample_names]
        log.write(json.dumps([run.progress.samples, names]) + "\n")
        log.flush()
        return step(run, micro_batches, counts)

    train_loop.optimizer_step = recorded


def recorded_steps(folder: Path, name: str) -> list[tuple[int, list[str]]]:
    """What the ranks of a launch wrote down; a line torn by a kill took no part in a save."""
    entries = []
    for path in folder.glob(f"{name}_*.steps"):
        for line in path.read_text().splitlines():
            try:
                entries.append(tuple(json.loads(line)))
            except ValueError:
                continue
    return entries
