"""Starts the repository's programs in processes forked from one that has imported everything, so
that a start takes a tenth of a second instead of several. Signals, files, terminals and exit
statuses are real.

Cold, by `subprocess`, start the tests of the start itself, of what Python or a library reads from
the environment while it starts, and of processes that are looked for by their command lines.
"""

import atexit
import contextlib
import fcntl
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import termios
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import PIPE, STDOUT

from support.rank_group import CONTEXT, begin_as_python_does

ROOT = Path(__file__).resolve().parents[2]
RUN_MODULE = "-m"
STEP_S = 900  # a busy machine is slow


def _become(words: list[str], environment: dict, cwd: str, ends: list[Connection], leads: bool):
    """What the new process does: all that `python words...` would."""
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    if leads:
        os.setsid()
        if os.isatty(0):  # its own terminal, so that its Ctrl-C arrives as a signal
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(n, "w", 1, encoding="utf-8", closefd=False) for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin_as_python_does()
    try:
        if words[0] == RUN_MODULE:
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Program:
    """A script of the repository, or `-m` and a module, as a running process; much like
    `subprocess.Popen` with text, and killed at the end of a `with`.

    Args:
        stdin, stdout, stderr: a descriptor, or a file with one; None is no input, and output that
            nobody reads. Output also goes to PIPE, and errors to STDOUT.
        leads: whether it leads a session of its own, with the terminal of its input if that is one.
    """

    def __init__(
        self, *words, cwd=None, env=None, stdin=None, stdout=None, stderr=None, leads=False
    ):
        self.args = [str(word) for word in words]
        if self.args[0] != RUN_MODULE:
            self.args[0] = str(ROOT / self.args[0])
        assert not any(name.startswith("PYTHON") for name in env or {}), "start Python itself"
        self.stdout = self.stderr = None
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | (env or {})
        ends = []
        for name, file in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
            if file == PIPE:
                reader, end = os.pipe()
                setattr(self, name, open(reader, encoding="utf-8"))
            elif file == STDOUT:
                end = os.dup(ends[1].fileno())
            else:
                end = os.open(os.devnull, os.O_RDWR) if file is None else os.dup(_number(file))
            ends.append(Connection(end))
        arguments = (self.args, dict(environment), str(cwd or os.getcwd()), ends, leads)
        self._process = CONTEXT.Process(target=_become, args=arguments)
        self._process.start()
        for end in ends:
            end.close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        self.wait()
        for pipe in (self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()


def _number(file) -> int:
    return file if isinstance(file, int) else file.fileno()


def run(*words, cwd=None, env=None, stdin: str | None = None, timeout_s: float = 300):
    """Run a program to its end; returns it as `subprocess.run` does, with its output as text."""
    with contextlib.ExitStack() as stack:
        given, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        given.write((stdin or "").encode())
        given.seek(0)
        with Program(*words, cwd=cwd, env=env, stdin=given, stdout=out, stderr=err) as program:
            status = program.wait(timeout_s)
        out.seek(0)
        err.seek(0)
        texts = [file.read().decode() for file in (out, err)]
    return subprocess.CompletedProcess(program.args, status, *texts)


def run_step(*words) -> None:
    """In the place of a chain's `run_script`: the words, and what the script says, are printed."""
    print(f"\n$ python {' '.join(map(str, words))}", flush=True)
    with Program(*words, cwd=ROOT, stdout=1, stderr=2) as program:
        assert program.wait(STEP_S) == 0
