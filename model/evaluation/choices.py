"""Owns answering multiple choice: the likeliest option, accuracy by category, two weights compared.

In circular scoring a question is asked with its options in every rotation, and it is right only if
the right option is chosen each time.
Source: Liu et al., "MMBench: Is Your Multi-modal Model an All-around Player?" (ECCV 2024).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from model.evaluation.evaluator import Evaluator, SampleLike
from model.evaluation.report import BOOTSTRAP_SEED
from model.evaluation.statistics import interval, resample, wilson_lower_bound
from model.evaluation.task import Group, progress
from model.generation.engine import VLMEngine
from model.vlm_processor import VLMProcessor


class ChoiceLike(Protocol):
    """A question with its options; `dataset.evaluation.multiple_choice.Choice` is one."""

    @property
    def index(self) -> int: ...

    @property
    def where(self) -> str: ...

    @property
    def options(self) -> tuple[str, ...]: ...

    @property
    def answer(self) -> int: ...

    @property
    def category(self) -> str: ...

    @property
    def l2_category(self) -> str: ...

    @property
    def image(self) -> bytes: ...

    def turned(self, shift: int) -> "ChoiceLike": ...

    def candidates(
        self, processor: VLMProcessor, pixels: Tensor, *, mode: str, max_length: int
    ) -> Sequence[SampleLike]: ...


@dataclass(frozen=True)
class ChoiceRow:
    """The option chosen; in circular scoring `is_right` says whether it was under every order."""

    index: int
    category: str
    l2_category: str
    num_options: int
    answer: int
    chosen: int
    is_right: bool


@dataclass(frozen=True)
class ChoiceResults:
    """All rows of a file, from every rank, in order, and how many questions are left out."""

    rows: list[ChoiceRow]
    left_out: Counter[str]


class Choices:
    """The task of answering multiple choice: `Task[ChoiceResults]`.

    Args:
        open_questions: the questions, or the errors that say why there is none; opened anew for
            each weight.
        source: their file, as errors name it.
        mode: "letter" or "text", as `candidates` takes it.
        max_length: longest question in tokens.
        warn: prints a warning.
    """

    def __init__(
        self,
        open_questions: Callable[[], Iterable[ChoiceLike | Exception]],
        *,
        source: Path,
        mode: str,
        circular: bool,
        max_length: int,
        batch_size: int,
        group: Group,
        warn: Callable[[str], None],
    ):
        self.open_questions, self.source = open_questions, source
        self.mode, self.circular, self.max_length = mode, circular, max_length
        self.batch_size, self.group, self.warn = batch_size, group, warn

    def run(self, engine: VLMEngine) -> ChoiceResults:
        evaluator = Evaluator(engine, batch_size=self.batch_size)
        chosen = self.group.collect(partial(self._choose_all, evaluator, self.open_questions()))
        rows = sorted((row for some, _ in chosen for row in some), key=lambda row: row.index)
        left_out = [reason for _, reasons in chosen for reason in reasons]
        if not rows:
            why = f" ({left_out[0]})" if left_out else ""
            raise ValueError(f"{self.source}: no usable question{why}")
        if left_out:
            self.warn(f"{len(left_out)} question(s) are left out, as {left_out[0]}")
        return ChoiceResults(rows, Counter(["unusable"] * len(left_out)))

    def _choose_all(
        self, evaluator: Evaluator, questions: Iterable[ChoiceLike | Exception]
    ) -> list[tuple[list[ChoiceRow], list[str]]]:
        """Rows of each of this rank's batches, and why other questions are left out."""
        chosen = []
        for batch in progress(self.group.batches(questions, self.batch_size), self.group):
            usable = [question for question in batch if not isinstance(question, Exception)]
            unreadable = [str(error) for error in batch if isinstance(error, Exception)]
            rows, left_out = self._choose(evaluator, usable)
            chosen.append((rows, unreadable + left_out))
        return chosen

    def _choose(
        self, evaluator: Evaluator, questions: list[ChoiceLike]
    ) -> tuple[list[ChoiceRow], list[str]]:
        """Rows of a batch, and why the other questions could not be asked."""
        rows, left_out, pictures = [], [], {}
        for question in questions:
            try:
                pixels = evaluator.processor.pixel_values([question.image])
                pictures[question.index] = pixels[0]
            except ValueError as error:
                left_out.append(f"{question.where}: {error}")
        features = evaluator.encode(pictures)
        for question in (q for q in questions if q.index in pictures):
            try:
                chosen = self._likeliest(
                    evaluator, question, pictures[question.index], features[question.index]
                )
            except ValueError as error:
                left_out.append(str(error))
            else:
                rows.append(_choice_row(question, chosen))
        return rows, left_out

    def _likeliest(
        self, evaluator: Evaluator, question: ChoiceLike, picture: Tensor, features: Tensor
    ) -> list[int]:
        """The option with the lowest loss per token, under each order of the options."""
        chosen = []
        for shift in range(len(question.options) if self.circular else 1):
            samples = question.turned(shift).candidates(
                evaluator.processor, picture[None], mode=self.mode, max_length=self.max_length
            )
            scores = evaluator.score_candidates(samples, features[None, None])[0]
            losses = [score.loss for score in scores]
            chosen.append((losses.index(min(losses)) + shift) % len(losses))
        return chosen

    def report(self, result: ChoiceResults) -> dict[str, Any]:
        return choice_report(result, circular=self.circular)

    def print_report(self, report: dict[str, Any]) -> None:
        print_choices(report)

    def compare(self, first: ChoiceResults, second: ChoiceResults) -> dict[str, Any]:
        return compare_choices(first.rows, second.rows)

    def print_difference(self, difference: dict[str, Any]) -> None:
        value, low, high = (f"{difference[name]:+.1%}" for name in ("value", "low", "high"))
        print(f"right: {value} [{low}, {high}]")


def _choice_row(question: ChoiceLike, chosen: list[int]) -> ChoiceRow:
    return ChoiceRow(
        index=question.index,
        category=question.category,
        l2_category=question.l2_category,
        num_options=len(question.options),
        answer=question.answer,
        chosen=chosen[0],
        is_right=all(option == question.answer for option in chosen),
    )


def choice_report(results: ChoiceResults, *, circular: bool) -> dict[str, Any]:
    """Accuracy by category, beside that of guessing.

    A guess among n options is right with probability 1 / n. In circular scoring the n orders are
    guessed independently and all must be right: n**-n.
    """

    def chance(num_options: int) -> float:
        return (1 / num_options) ** (num_options if circular else 1)

    groups = defaultdict(list)
    for row in results.rows:
        groups[row.category].append(row)
        if row.l2_category:
            groups[f"{row.category} / {row.l2_category}"].append(row)
    groups["all"] = results.rows
    cells = {}
    for name, members in sorted(groups.items(), key=lambda item: item[0] == "all"):
        cells[name] = {
            "right": sum(r.is_right for r in members),
            "total": len(members),
            "chance": float(np.mean([chance(r.num_options) for r in members])),
        }
    return {
        "categories": cells,
        "predictions": [[r.index, r.answer, r.chosen, r.is_right] for r in results.rows],
        "left_out": dict(results.left_out),
    }


def compare_choices(first: list[ChoiceRow], second: list[ChoiceRow]) -> dict[str, Any]:
    """The second's accuracy minus the first's, with its interval, on the questions both have.

    Raises:
        ValueError: there is no such question.
    """
    before, after = ({r.index: r.is_right for r in rows} for rows in (first, second))
    gains = np.array([[float(after[i]) - before[i], 1.0] for i in before if i in after])
    if not len(gains):
        raise ValueError("no question could be answered with both weights; see what was left out")
    drawn = resample(gains, seed=BOOTSTRAP_SEED)
    return interval(float(gains[:, 0].mean()), drawn[:, 0] / drawn[:, 1])


def print_choices(report: dict[str, Any]) -> None:
    """A row for each category."""
    if report["left_out"]:
        reasons = ", ".join(f"{n} ({why})" for why, n in report["left_out"].items())
        print(f"left out: {reasons}")
    width = max(map(len, report["categories"])) + 2
    print(f"{'category':{width}}{'questions':>10}{'right':>8}{'>= (95%)':>10}{'chance':>8}")
    for name, cell in report["categories"].items():
        share = cell["right"] / cell["total"]
        bound = wilson_lower_bound(cell["right"], cell["total"])
        print(f"{name:{width}}{cell['total']:>10}{share:>8.1%}{bound:>10.1%}{cell['chance']:>8.1%}")
