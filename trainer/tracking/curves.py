"""Owns the curves of training runs: metrics files -> one PNG, several runs overlaid."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.machine.atomic_file import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS_SUFFIX = "_metrics.jsonl"
PANELS = (  # field, title, axis, logarithmic
    ("loss", "training loss", "nats per supervised token", False),
    ("val_loss", "validation loss", "nats per supervised token", False),
    ("grad_norm", "gradient norm, before clipping", "", True),
    ("lr", "learning rate", "", False),
)
# Takes the place of the validation loss where a run has rewards and no such loss.
REWARD_PANEL = ("reward", "reward of drawn answers", "", False)
FEW_POINTS = 40  # up to here every point is marked
NUM_LEGEND_COLUMNS, LEGEND_ROW = 2, 0.22  # inches
SMOOTH_SHARE = 0.05  # of the points: the width of the running mean's window


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The figures of a run, a dict a line; a line cut off by a kill is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no figures of a run.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics file {path}; a run writes NAME{METRICS_SUFFIX} into --save_dir"
        )
    figures = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict) and isinstance(parsed.get("step"), int):
            figures.append(parsed)
    if not figures:
        raise ValueError(f"{path} holds no figures of a run (JSON objects with a 'step')")
    return figures


def points(figures: list[dict[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """Steps and values of one field; a value that was not finite is NaN, a gap in the curve."""
    found = [(f["step"], f[field]) for f in figures if field in f]
    values = [math.nan if value is None else float(value) for _, value in found]
    return [step for step, _ in found], values


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and up to `width - 1` before it, without those that are not finite."""
    means = []
    for end in range(1, len(values) + 1):
        window = [v for v in values[max(0, end - width) : end] if not math.isnan(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def draw_curve(
    axes: "Axes",
    figures: list[dict[str, Any]],
    field: str,
    *,
    label: str | None = None,
    color: str = "C0",
) -> bool:
    """Draw one field of one run into matplotlib axes; a long one gets its running mean too.

    Returns:
        Whether there was anything to draw.
    """
    steps, values = points(figures, field)
    if all(math.isnan(value) for value in values):
        return False
    is_long = len(values) > FEW_POINTS
    is_noisy = is_long and field != "lr"
    axes.plot(
        steps,
        values,
        color=color,
        linewidth=1.2,
        marker=None if is_long else ".",
        alpha=0.3 if is_noisy else 1.0,
        label=None if is_noisy else label,
    )
    if is_noisy:
        means = running_mean(values, max(2, round(SMOOTH_SHARE * len(values))))
        axes.plot(steps, means, color=color, linewidth=1.6, label=label)
    return True


def draw_runs(runs: dict[str, list[dict[str, Any]]]) -> "Figure":
    """A matplotlib figure with a panel for each of `PANELS` and a curve for each named run."""
    from matplotlib.figure import Figure  # half a second, so only where a picture is drawn
    from matplotlib.ticker import LogFormatter

    legend = LEGEND_ROW * math.ceil(len(runs) / NUM_LEGEND_COLUMNS)  # inches, below the panels
    height = 6.8 + legend
    figure = Figure(figsize=(11, height))
    top, bottom = 1 - 0.35 / height, (0.7 + legend) / height
    figure.subplots_adjust(left=0.07, right=0.98, top=top, bottom=bottom, hspace=0.32, wspace=0.18)
    fields = {field for figures in runs.values() for one in figures for field in one}
    has_rewards = "reward" in fields and "val_loss" not in fields
    panels = [REWARD_PANEL if has_rewards and p[0] == "val_loss" else p for p in PANELS]
    for axes, (field, title, unit, is_log) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        drawn = [
            draw_curve(axes, figures, field, label=name, color=f"C{i}")
            for i, (name, figures) in enumerate(runs.items())
        ]
        axes.set_title(title, fontsize=10)
        if not any(drawn):
            axes.text(
                0.5,
                0.5,
                "none in this run" if len(runs) == 1 else "none in these runs",
                ha="center",
                va="center",
                color="0.5",
                transform=axes.transAxes,
            )
            axes.set(xticks=[], yticks=[])
            continue
        positive = any(v > 0 for figures in runs.values() for v in points(figures, field)[1])
        axes.set(xlabel="optimizer step", ylabel=unit)
        if is_log and positive:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="lower center",
        ncols=NUM_LEGEND_COLUMNS,
        frameon=False,
    )
    return figure


def run_names(paths: list[Path]) -> list[str]:
    """A short name for each metrics file; files of the same name get their folder before it."""
    paths = [path.resolve() for path in paths]
    stems = [path.name.removesuffix(METRICS_SUFFIX) for path in paths]
    longer = [f"{path.parent.name}/{stem}" for path, stem in zip(paths, stems, strict=True)]
    for names in (stems, longer):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def write_curves(paths: list[Path], out: Path) -> None:
    """Draw the runs of these metrics files into a PNG.

    Raises:
        FileNotFoundError, ValueError: see `read_metrics`.
        OSError: it could not be written.
    """
    runs = dict(zip(run_names(paths), map(read_metrics, paths), strict=True))
    figure = draw_runs(runs)
    atomic_write(out, lambda file: figure.savefig(file, format="png", dpi=100))
