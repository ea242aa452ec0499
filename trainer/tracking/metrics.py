"""Owns figures: what a log window measures, and where it goes (console, JSON lines, a tracker)."""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.machine.atomic_file import atomic_write
from trainer.ranks.group import warn

GIB = 2**30


try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_gib(device: torch.device) -> float:
    """Most memory held so far, of the GPU or of this process on a CPU; NaN where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if resource is None:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class LogWindow:
    """Sums over the steps between two log lines. Tensors stay on the device until `read`."""

    def __init__(self):
        self.started_s = time.perf_counter()
        self.wait_s = 0.0
        self.supervised = self.tokens = self.samples = self.sequences = 0.0
        self.has_gradient = True  # known once it was read
        self.loss_sum: torch.Tensor | float = 0.0
        self.aux_sum: torch.Tensor | float = 0.0
        self.grad_norm: torch.Tensor | float = 0.0
        self.grad_peak: torch.Tensor | float | None = None
        self.source_sums: torch.Tensor | None = None  # of a mixture: losses, then tokens

    def add(self, update) -> None:
        """Count one optimizer step (a `StepResult`); one that was left out adds no loss."""
        self.samples += update.samples
        self.tokens += update.tokens
        kept = (~update.is_bad).to(update.loss_sum.dtype)
        self.supervised = self.supervised + update.supervised * kept
        self.sequences = self.sequences + update.sequences * kept
        self.loss_sum = self.loss_sum + torch.where(update.is_bad, 0.0, update.loss_sum)
        self.aux_sum = self.aux_sum + torch.where(update.is_bad, 0.0, update.aux_sum)
        if update.source_sums is not None:
            own = torch.where(update.is_bad, 0.0, update.source_sums)
            self.source_sums = own if self.source_sums is None else self.source_sums + own
        self.grad_norm = update.grad_norm
        is_first = self.grad_peak is None
        self.grad_peak = (
            update.grad_norm if is_first else torch.maximum(self.grad_peak, update.grad_norm)
        )

    def read(self, device: torch.device, *, source_names: Sequence[str] = ()) -> dict[str, Any]:
        """The window's figures; the one place that waits for the device.

        Loss is the mean per supervised token, without the MoE loss, which is the mean per
        sequence; tokens are those of the text and the images, without padding. `loss/NAME` is the
        loss of a source of a mixture, None where the window had nothing of it.
        """
        peak = float("nan") if self.grad_peak is None else self.grad_peak
        values = (
            self.loss_sum,
            self.aux_sum,
            self.grad_norm,
            peak,
            self.supervised,
            self.sequences,
        )
        stacked = torch.stack([torch.as_tensor(v).detach().float().cpu() for v in values])
        loss_sum, aux_sum, grad_norm, peak, supervised, sequences = stacked.tolist()
        self.has_gradient = peak != 0
        elapsed_s = max(time.perf_counter() - self.started_s, 1e-9)
        return {
            "loss": loss_sum / supervised if supervised else None,
            "aux_loss": aux_sum / sequences if sequences else None,
            "grad_norm": grad_norm,
            "tokens_per_s": self.tokens / elapsed_s,
            "samples_per_s": self.samples / elapsed_s,
            "data_wait_pct": 100 * self.wait_s / elapsed_s,
            "peak_gib": peak_gib(device),
            **self._source_losses(source_names),
        }

    def _source_losses(self, names: Sequence[str]) -> dict[str, float | None]:
        if self.source_sums is None:
            return {f"loss/{name}": None for name in names}
        sums = self.source_sums.tolist()
        pairs = zip(names, sums[: len(names)], sums[len(names) :], strict=True)
        return {f"loss/{name}": loss / tokens if tokens else None for name, loss, tokens in pairs}


class JsonLog:
    """The metrics file: one JSON object a line, kept across resumes.

    Args:
        resume_step: drop the lines of later steps, which come again; None starts a new file.
        num_validated: drop validations of later epochs, which come again.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None, num_validated: int = 0):
        self._path, self._resume_step, self._num_validated = path, resume_step, num_validated
        self._file: FileIO | None = (
            None  # opened by the first line: a run that never starts changes nothing
        )
        self._waiting = b""  # lines that could not be written yet

    def _open(self) -> None:
        kept = b""
        if self._resume_step is not None and self._path.is_file():
            kept = b"".join(self._former_lines(self._resume_step))
        atomic_write(self._path, lambda file: file.write(kept))
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115, closed by close()

    def _former_lines(self, step: int) -> list[bytes]:
        lines = []
        for line in self._path.read_bytes().splitlines(keepends=True):
            try:
                figures = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            comes_again = "val_loss" in figures and figures["epoch"] > self._num_validated
            if figures.get("step", 0) <= step and not comes_again:
                lines.append(line)
        return lines

    def write(self, figures: dict[str, Any]) -> None:
        """Write a line; one that cannot be written is kept and tried again, with one warning."""
        finite = {k: None if _is_not_finite(v) else v for k, v in figures.items()}
        line = json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"
        had_trouble, self._waiting = bool(self._waiting), self._waiting + line.encode()
        failure = self._drain()
        if failure and not had_trouble:
            warn(f"{self._path} cannot be written ({failure}); training goes on and tries again")

    def _drain(self) -> OSError | None:
        """Write the waiting lines; what a full disk does not take stays waiting."""
        try:
            if self._file is None:
                self._open()
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def close(self, outcome: str = "success") -> None:
        if self._waiting and self._drain():
            warn(f"{self._path} lacks its last {self._waiting.count(10)} line(s): no room for them")
        if self._file is not None:
            self._file.close()


def _is_not_finite(value: Any) -> bool:
    """JSON has no NaN and no infinity."""
    return isinstance(value, float) and not math.isfinite(value)


class Console:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, *, total_samples: int, done_samples: int):
        self._bar = None
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = tqdm(
                total=total_samples,
                initial=done_samples,
                unit="sample",
                dynamic_ncols=True,
                file=sys.stdout,
                leave=False,
            )

    def advance(self, samples: int) -> None:
        if self._bar is not None:
            self._bar.update(samples)

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Metrics:
    """All sinks of the main process; the other ranks have none (`active=False`)."""

    def __init__(
        self, *, active: bool, console: Console | None = None, sinks: list[Any] | None = None
    ):
        self.active = active
        self.console = console
        self.sinks = sinks or []

    def advance(self, samples: int) -> None:
        if self.active:
            self.console.advance(samples)

    def line(self, text: str) -> None:
        if self.active:
            self.console.line(text)

    def write(self, figures: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(figures)

    def close(self, *, outcome: str = "success") -> None:
        """Args: outcome: "success", "aborted" (stopped, may be resumed) or "crashed"."""
        if self.console is not None:
            self.console.close()
        for sink in self.sinks:
            sink.close(outcome)
