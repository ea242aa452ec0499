"""Owns the figures of a benchmark: medians over rounds, shares of the matrix rate, tables."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from trainer.measuring.runs import Round


def run_figures(
    rounds: Sequence[Round], *, flop: dict[str, float], gflops: float
) -> dict[str, Any]:
    """Figures of one way to train.

    Args:
        flop: of a step. gflops: the matrix rate that its share is taken of.
    """
    step_s = median(r.seconds / r.steps for r in rounds)
    return {
        "step_s": step_s,
        "step_s_rounds": [r.seconds / r.steps for r in rounds],
        "samples_per_s": median(r.samples / r.seconds for r in rounds),
        "tokens_per_s": median(r.tokens / r.seconds for r in rounds),
        "padded_tokens_per_s": median(r.padded_tokens / r.seconds for r in rounds),
        "data_wait": median(r.wait_s / r.seconds for r in rounds),
        "flop_per_step": flop,
        "matrix_share": flop["total"] / step_s / (1e9 * gflops),
    }


def phase_rates(
    phases: dict[str, float], *, step_s: float, flop: dict[str, float], gflops: float
) -> dict[str, float]:
    """Share of the matrix rate that tower and language model reach in their own time."""
    llm_s = step_s * (phases["forward"] + phases["backward"])
    rates = {"llm": (flop["total"] - flop["tower"]) / llm_s / (1e9 * gflops)}
    if phases.get("tower"):
        rates["tower"] = flop["tower"] / (step_s * phases["tower"]) / (1e9 * gflops)
    return rates


def speedup(ours: Sequence[Round], plain: Sequence[Round]) -> float:
    """How many times as many samples a second; the median over pairs of rounds."""
    return median(
        (a.samples / a.seconds) / (b.samples / b.seconds) for a, b in zip(ours, plain, strict=True)
    )


def print_run(name: str, figures: dict[str, Any]) -> None:
    print(
        f"{name:10} {figures['step_s']:8.3f} s a step, {figures['samples_per_s']:8.1f} samples/s, "
        f"{figures['tokens_per_s']:8.0f} tokens/s ({figures['padded_tokens_per_s']:.0f} padded), "
        f"{figures['flop_per_step']['total'] / 1e12:.3f} TFLOP a step, "
        f"{figures['matrix_share']:.0%} of the matrix rate"
    )


def print_phases(phases: dict[str, float], rates: dict[str, float]) -> None:
    shown = ", ".join(f"{name} {share:.1%}" for name, share in phases.items())
    print(f"where its time goes: {shown}")
    shown = ", ".join(f"{name} {rate:.0%}" for name, rate in sorted(rates.items()))
    print(f"of the matrix rate, in their own time: {shown}")


def print_comparison(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two reports side by side. Speeds of two runs are compared by their share of the matrix rate
    of each, too: machines differ, and so does one machine from hour to hour."""
    print(f"{'':32}{'first':>14}{'second':>14}{'ratio':>10}")
    rows = [
        (f"{kind}: {name}", *(report[kind][name] for report in (before, after)))
        for kind in ("ordinary", "plain")
        for name in ("step_s", "samples_per_s", "tokens_per_s", "matrix_share")
        if kind in before and kind in after
    ]
    rows += [
        (f"GFLOP/s, {dtype}", *(report["matrix_gflops"][dtype] for report in (before, after)))
        for dtype in before["matrix_gflops"].keys() & after["matrix_gflops"].keys()
    ]
    for name, first, second in rows:
        print(f"{name:32}{first:14.4g}{second:14.4g}{second / first:10.3f}")
    different = [
        name for name, value in before["setting"].items() if after["setting"].get(name) != value
    ]
    if different:
        print(f"their settings differ in {', '.join(sorted(different))}")
