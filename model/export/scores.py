"""Owns the scores of a model card: what `eval_vlm.py --json` wrote, as tables in Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BESIDE = "scores.json"  # in the weight's folder; read where it says that it is of this weight
INTERVAL = ("value", "low", "high")


def find_scores(weight: Path, given: Path | None) -> dict[str, Any] | None:
    """The scores of a weight; None where there are none.

    Args:
        given: the file that the user names; else one beside the weight is taken, if it is its.
    Raises:
        FileNotFoundError, ValueError: the named file is missing, damaged or of another weight.
    """
    path = given or weight.parent / BESIDE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        scored = Path(found["weight"]).name
        tables(found)
    except FileNotFoundError:
        if given:
            raise FileNotFoundError(
                f"--scores {path}: no such file; eval_vlm.py --json {path} writes it"
            ) from None
        return None
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        if not given:
            return None
        raise ValueError(
            f"--scores {path} is not what eval_vlm.py --json writes of one weight ({error!r})"
        ) from None
    if scored == weight.name:
        result: dict[str, Any] = found
        return result
    if given:
        raise ValueError(f"--scores {path} is of {scored}, not of {weight.name}; name another")
    return None


def tables(scores: dict[str, Any]) -> str:
    """Markdown of a report: of records, of multiple choice, or of a benchmark.

    Raises:
        KeyError, TypeError: it is none of these.
    """
    if "benchmark" in scores:
        return f"{scores['benchmark']}:\n\n{_of_benchmark(scores['categories'])}"
    if "categories" in scores:
        rows = [
            [name, cell["total"], _share(cell), f"{cell['chance']:.1%}"]
            for name, cell in scores["categories"].items()
        ]
        return _table(["questions of", "number", "right", "chance"], rows)
    conditions = ["right", "shuffled", "blind"]
    rows = [
        [name, scores["right"][name]["total"], *(_share(scores[c].get(name)) for c in conditions)]
        for name in sorted(scores["right"], key=lambda name: name == "all")
    ]
    exact = ["questions of", "number", "right", "with another's picture", "with no picture"]
    figures = [
        [name, *(f"{figure[part]:.3f}" for part in INTERVAL)]
        for name, figure in scores["languages"]["all"].items()
        if isinstance(figure, dict) and set(INTERVAL) <= figure.keys()
    ]
    return f"{_table(exact, rows)}\n\n{_table(['figure', 'value', '95% from', 'to'], figures)}"


def _of_benchmark(categories: dict[str, Any]) -> str:
    """Accuracy by likelihood and of what was said."""
    ways = ("likelihood", "generation")
    rows = [
        [name, cell["total"], *(_figure(cell[way]["accuracy"]) for way in ways)]
        + [f"{cell['chance']:.1%}"]
        for name, cell in categories.items()
    ]
    return _table(["questions of", "number", "by likelihood", "as said", "chance"], rows)


def _figure(figure: dict[str, float]) -> str:
    value, low, high = (f"{figure[part]:.1%}" for part in INTERVAL)
    return f"{value} [{low}, {high}]"


def _share(cell: dict[str, Any] | None) -> str:
    return f"{cell['right'] / cell['total']:.1%}" if cell else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
