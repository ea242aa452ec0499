"""Owns running a script of the repository to its end, as one process or as several ranks of this
machine that train together.

torchrun does this too, and more; but when it is interrupted it says so at length, and it passes
Ctrl-C on to ranks in its own way. Here the ranks stay in the terminal's group: each gets Ctrl-C,
saves and leaves, and this process waits for them.
"""

import os
import signal
import socket
import subprocess
import sys

from model.weights import ROOT

LOCALHOST = "127.0.0.1"


def run_script(*words: object, num_ranks: int = 1) -> None:
    """Run `python words...` in the repository; the output goes to the terminal.

    A rank that fails ends the others (`trainer.rank_watch`).

    Raises:
        subprocess.CalledProcessError: it ended with another status than 0.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the processes have ended.
    """
    command = [sys.executable, *map(str, words)]
    shown = " ".join(command[1:])
    print(f"\n$ {f'(as {num_ranks} ranks) ' if num_ranks > 1 else ''}python {shown}", flush=True)
    processes: list[subprocess.Popen] = []

    def pass_on(_signum, _frame) -> None:
        for process in processes:
            process.terminate()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        for environment in _environments(num_ranks):
            processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | environment))
        statuses = [process.wait() for process in processes]
    except BaseException:
        for process in processes:  # Ctrl-C went to them as well: they save, then leave
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    for status in filter(None, statuses):
        if status in (128 + signal.SIGINT, -signal.SIGINT):
            raise KeyboardInterrupt
        raise subprocess.CalledProcessError(status, command)


def _environments(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank."""
    if num_ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks)),
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
