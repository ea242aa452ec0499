"""Owns answering a published benchmark, by the likelihood of the options and by generation."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from model.evaluation.answer_rules import RULES, is_clear
from model.evaluation.benchmark_report import (
    BenchmarkRow,
    benchmark_report,
    compare_rows,
    print_benchmark,
    print_gains,
)
from model.evaluation.choices import ChoiceLike, Choices
from model.evaluation.task import Group, progress
from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling
from model.generation.thinking import without_thinking


class AskedLike(ChoiceLike, Protocol):
    """A question that can be asked; `dataset.evaluation.multiple_choice.Choice` is one."""

    @property
    def question_id(self) -> str: ...

    def prompt(self, mode: str) -> str: ...


class BenchmarkLike(Protocol):
    """`dataset.evaluation.benchmarks.Benchmark`."""

    @property
    def title(self) -> str: ...

    @property
    def rule(self) -> str: ...

    @property
    def mode(self) -> str: ...

    @property
    def is_yes_or_no(self) -> bool: ...


@dataclass(frozen=True)
class BenchmarkResults:
    """All rows of a benchmark, from every rank, in order."""

    rows: list[BenchmarkRow]
    left_out: Counter[str]
    decoding: dict[str, float]


class BenchmarkScores:
    """The task of answering a benchmark: `Task[BenchmarkResults]`.

    Args:
        open_questions: as `Choices` takes it; opened twice for each weight.
        sampling: of a weight's generation.
        source: the benchmark's file, as errors name it.
        warn: prints a warning.
    """

    def __init__(
        self,
        benchmark: BenchmarkLike,
        open_questions: Callable[[], Iterable[AskedLike | Exception]],
        sampling: Callable[[int], Sampling],
        *,
        source: Path,
        max_length: int,
        batch_size: int,
        group: Group,
        warn: Callable[[str], None],
    ):
        self.benchmark, self.open_questions, self.sampling = benchmark, open_questions, sampling
        self.batch_size, self.group = batch_size, group
        self._choices = Choices(
            open_questions,
            source=source,
            mode=benchmark.mode,
            circular=False,
            max_length=max_length,
            batch_size=batch_size,
            group=group,
            warn=warn,
        )

    def run(self, engine: VLMEngine) -> BenchmarkResults:
        likely = self._choices.run(engine)
        chosen = {row.index: row.chosen for row in likely.rows}
        sampling = self.sampling(engine.generation)
        rows = self.group.collect(partial(self._answer_all, engine, sampling, chosen))
        return BenchmarkResults(
            sorted(rows, key=lambda row: row.index), likely.left_out, sampling.decoding
        )

    def _answer_all(
        self, engine: VLMEngine, sampling: Sampling, chosen: dict[int, int]
    ) -> list[BenchmarkRow]:
        """This rank's rows of the questions that were scored.

        Args:
            chosen: index of a question -> its likeliest option.
        """
        usable = (
            question
            for question in self.open_questions()
            if not isinstance(question, Exception) and question.index in chosen
        )
        rows = []
        for batch in progress(self.group.batches(usable, self.batch_size), self.group):
            asked = [
                ([{"role": "user", "content": q.prompt(self.benchmark.mode)}], [q.image])
                for q in batch
            ]
            answers = engine.generate(asked, sampling)
            for question, answer in zip(batch, answers, strict=True):
                text = without_thinking(answer.text) if engine.can_think else answer.text
                rows.append(self._row(question, chosen[question.index], text))
        return rows

    def _row(self, question: AskedLike, likely: int, text: str) -> BenchmarkRow:
        rule = self.benchmark.rule
        return BenchmarkRow(
            index=question.index,
            question_id=question.question_id,
            unit=hashlib.sha1(question.image).hexdigest(),
            category=question.category,
            l2_category=question.l2_category,
            num_options=len(question.options),
            answer=question.answer,
            likely=likely,
            said=RULES[rule](text, question.options),
            is_clear=is_clear(text, rule, question.options),
            text=text,
        )

    def report(self, result: BenchmarkResults) -> dict[str, Any]:
        figures = benchmark_report(result.rows, is_yes_or_no=self.benchmark.is_yes_or_no)
        return {
            "benchmark": self.benchmark.title,
            "rule": self.benchmark.rule,
            "left_out": dict(result.left_out),
            "decoding": result.decoding,
        } | figures

    def print_report(self, report: dict[str, Any]) -> None:
        print_benchmark(report)

    def compare(self, first: BenchmarkResults, second: BenchmarkResults) -> dict[str, Any]:
        return compare_rows(first.rows, second.rows, is_yes_or_no=self.benchmark.is_yes_or_no)

    def print_difference(self, difference: dict[str, Any]) -> None:
        print_gains(difference)
