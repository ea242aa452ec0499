"""Owns the report of a benchmark: figures with intervals, as a table that a README can carry.

Intervals are the middle 95% of a bootstrap over pictures, each drawn with all of its questions.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from model.evaluation.report import BOOTSTRAP, BOOTSTRAP_SEED
from model.evaluation.statistics import interval, resample

YES = 0  # position of the option
FIGURES = {  # figure -> (above and below the line, what the table calls it)
    "accuracy": ("right", "total", "accuracy"),
    "circular": ("all_right", "questions", "in every order"),
    "precision": ("hits", "yes", "precision"),
    "recall": ("hits", "true", "recall"),
    "f1": ("twice_hits", "yes_and_true", "F1"),
    "yes_share": ("yes", "total", "says yes"),
}
WAYS = ("likelihood", "generation")


@dataclass(frozen=True)
class BenchmarkRow:
    """A question answered both ways.

    unit: digest of the picture. question_id: the same for rows that ask one question with its
    options turned. answer, likely, said: positions of the right option, of the likeliest one and
    of that which the generated text names, None where it names none.
    """

    index: int
    question_id: str
    unit: str
    category: str
    l2_category: str
    num_options: int
    answer: int
    likely: int
    said: int | None
    is_clear: bool
    text: str

    def chosen(self, way: str) -> int | None:
        return self.likely if way == "likelihood" else self.said


def figure_names(rows: Iterable[BenchmarkRow], *, is_yes_or_no: bool) -> list[str]:
    """The figures of a benchmark: those of yes and no, or that of turned questions where it has
    any."""
    if is_yes_or_no:
        return ["accuracy", "precision", "recall", "f1", "yes_share"]
    times = Counter(row.question_id for row in rows)
    return ["accuracy", *(["circular"] if max(times.values()) > 1 else [])]


def _sums(rows: list[BenchmarkRow], way: str) -> dict[str, Counter[str]]:
    """The counts behind the figures, of each picture."""
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    is_all_right: dict[tuple[str, str], bool] = {}  # by picture and question
    for row in rows:
        chosen = row.chosen(way)
        is_right, says_yes, is_true = chosen == row.answer, chosen == YES, row.answer == YES
        sums[row.unit].update(
            right=is_right,
            total=1,
            yes=says_yes,
            true=is_true,
            hits=says_yes and is_true,
            twice_hits=2 * (says_yes and is_true),
            yes_and_true=says_yes + is_true,
        )
        key = (row.unit, row.question_id)
        is_all_right[key] = is_all_right.get(key, True) and is_right
    for (unit, _), is_right in is_all_right.items():
        sums[unit].update(all_right=is_right, questions=1)
    return sums


def _resampled(
    rows: list[BenchmarkRow], way: str, names: list[str]
) -> dict[str, tuple[float, np.ndarray]]:
    """Each figure of the rows, and of resamples of their pictures."""
    sums = _sums(rows, way)
    columns = sorted({part for name in names for part in FIGURES[name][:2]})
    table = np.array([[sums[unit][c] for c in columns] for unit in sorted(sums)], dtype=float)
    drawn = resample(table, seed=BOOTSTRAP_SEED)
    whole = table.sum(0, keepdims=True)
    found = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for name in names:
            above, below = (columns.index(part) for part in FIGURES[name][:2])
            figure, resampled = (t[:, above] / t[:, below] for t in (whole, drawn))
            found[name] = float(figure[0]), resampled
    return found


def _cell(rows: list[BenchmarkRow], names: list[str]) -> dict[str, Any]:
    """Everything about the rows of a category."""
    turns = defaultdict(list)
    for row in rows:
        turns[row.unit, row.question_id].append(1 / row.num_options)
    cell: dict[str, Any] = {
        "total": len(rows),
        "questions": len(turns),
        "chance": float(np.mean([1 / row.num_options for row in rows])),
        "circular_chance": float(np.mean([prod(shares) for shares in turns.values()])),
        "unclear": sum(not row.is_clear for row in rows),
    }
    for way in WAYS:
        found = _resampled(rows, way, names)
        cell[way] = {name: interval(*found[name]) for name in names}
    return cell


def benchmark_report(rows: list[BenchmarkRow], *, is_yes_or_no: bool) -> dict[str, Any]:
    """What the JSON holds of a benchmark's rows."""
    names = figure_names(rows, is_yes_or_no=is_yes_or_no)
    groups = defaultdict(list)
    for row in rows:
        groups[row.category].append(row)
        if row.l2_category:
            groups[f"{row.category} / {row.l2_category}"].append(row)
    groups["all"] = rows
    ordered = sorted(groups.items(), key=lambda item: (item[0] == "all", item[0]))
    return {
        "categories": {name: _cell(members, names) for name, members in ordered},
        "predictions": [[row.index, row.answer, row.likely, row.said, row.text] for row in rows],
        "bootstrap": BOOTSTRAP,
    }


def compare_rows(
    first: list[BenchmarkRow], second: list[BenchmarkRow], *, is_yes_or_no: bool
) -> dict[str, Any]:
    """The second's figures minus the first's, paired, on the questions that both answered.

    Raises:
        ValueError: there is no such question.
    """
    common = {row.index for row in first} & {row.index for row in second}
    if not common:
        raise ValueError("no question could be answered with both weights; see what was left out")
    before, after = ([row for row in rows if row.index in common] for rows in (first, second))
    names = figure_names(before, is_yes_or_no=is_yes_or_no)
    report = {}
    for way in WAYS:
        old, new = (_resampled(rows, way, names) for rows in (before, after))
        report[way] = {
            name: interval(new[name][0] - old[name][0], new[name][1] - old[name][1])
            for name in names
        }
    return report


def _percent(figure: dict[str, float] | None) -> str:
    if figure is None:
        return "-"
    value, low, high = (f"{100 * figure[name]:.1f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def print_benchmark(report: dict[str, Any]) -> None:
    """A table in Markdown: a row for each category and way, in percent with 95% intervals."""
    if report["left_out"]:
        reasons = ", ".join(f"{n} ({why})" for why, n in report["left_out"].items())
        print(f"left out: {reasons}\n")
    cells = report["categories"]
    figures = list(cells["all"]["likelihood"])
    chances: dict[str, Callable[[dict[str, Any]], str]] = {
        "accuracy": lambda cell: f"{100 * cell['chance']:.1f}",
        "circular": lambda cell: f"{100 * cell['circular_chance']:.1f}",
    }
    heads = ["by", "rows"]
    for name in figures:
        heads += [f"{FIGURES[name][2]}, % [95%]", *(["chance"] if name in chances else [])]
    print(f"| {report['benchmark']} | {' | '.join(heads)} | unclear |")
    print("|---" * (len(heads) + 2) + "|")
    for category, cell in cells.items():
        for way in WAYS:
            shown = [way, str(cell["total"])]
            for name in figures:
                shown.append(_percent(cell[way][name]))
                shown += [chances[name](cell)] if name in chances else []
            unclear = str(cell["unclear"]) if way == "generation" else ""
            print(f"| {category} | {' | '.join(shown)} | {unclear} |")


def print_gains(difference: dict[str, Any]) -> None:
    """The differences of two weights over all questions, in percentage points."""
    for way in WAYS:
        for name, figure in difference[way].items():
            print(f"{FIGURES[name][2]} by {way}: {_percent(figure)}")
