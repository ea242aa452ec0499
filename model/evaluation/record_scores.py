"""Owns scoring the answers of a data set: losses, captions and generated texts of its records."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from model.evaluation.evaluator import (
    AnswerRow,
    CaptionRow,
    Evaluator,
    QuestionLike,
    TextRow,
    WindowLike,
)
from model.evaluation.report import Results, build_report, compare, print_figures, print_report
from model.evaluation.task import Group, progress
from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling


class ScorableData(Protocol):
    """Records to score, a window of them at a time; `dataset.evaluation.eval_data.EvalData`."""

    window: int  # records in a window
    left_out: Counter[str]  # reason -> records
    examples: dict[str, str]  # reason -> the first record left out for it

    @property
    def num_windows(self) -> int: ...

    def read_window(self, number: int) -> WindowLike: ...

    def questions(self, usable: set[int]) -> list[Any]: ...

    def messages(self, question: Any) -> tuple[list[dict[str, str]], list[bytes | Tensor]]: ...


@dataclass(frozen=True)
class WindowScores:
    """The scores of one window, and its records that are left out: (reason, where)."""

    answers: list[AnswerRow]
    captions: list[CaptionRow]
    left_out: list[tuple[str, str]]


class RecordScores:
    """The task of scoring records: `Task[Results]`.

    Args:
        open_data: the data for an engine; each weight brings its own processor.
        sampling: of a weight's generation.
        source: the data's file, as errors name it.
        num_generate: answers to generate; 0 generates none.
        warn: prints a warning.
    """

    def __init__(
        self,
        open_data: Callable[[VLMEngine], ScorableData],
        sampling: Callable[[int], Sampling],
        *,
        source: Path,
        batch_size: int,
        num_generate: int,
        group: Group,
        warn: Callable[[str], None],
    ):
        self.open_data, self.sampling, self.source = open_data, sampling, source
        self.batch_size, self.num_generate = batch_size, num_generate
        self.group, self.warn = group, warn

    def run(self, engine: VLMEngine) -> Results:
        data = self.open_data(engine)
        evaluator = Evaluator(engine, batch_size=self.batch_size)
        results = self._score(evaluator, data)
        questions = self._questions(data, results)
        sampling = self.sampling(engine.generation)
        texts = self.group.collect(partial(self._answer, evaluator, data, questions, sampling))
        results.decoding = sampling.decoding if texts else {}
        results.texts = sorted(texts, key=lambda row: (row.index, row.turn))
        for question in questions:
            if question.is_caption:
                results.references.setdefault(question.language, []).append(question.references)
        return results

    def _score(self, evaluator: Evaluator, data: ScorableData) -> Results:
        """Losses and captions of all windows, from every rank."""
        scored = self.group.collect(partial(self._score_windows, evaluator, data))
        left_out = [pair for window in scored for pair in window.left_out]
        results = Results(
            answers=sorted(
                (row for window in scored for row in window.answers),
                key=lambda row: (row.index, row.turn),
            ),
            captions=sorted(
                (row for window in scored for row in window.captions), key=lambda row: row.index
            ),
            left_out=data.left_out + Counter(reason for reason, _ in left_out),
        )
        examples = dict(data.examples)
        for window in scored:  # the last window's example of a reason, the first in that window
            examples |= dict(reversed(window.left_out))
        if not results.answers:
            why = next(iter(examples.values()))
            raise ValueError(f"{self.source}: no usable record with images ({why})")
        if "broken" in examples:
            self.warn(f"{results.left_out['broken']} broken record(s), as {examples['broken']}")
        return results

    def _score_windows(self, evaluator: Evaluator, data: ScorableData) -> list[WindowScores]:
        """This rank's windows."""
        numbers = range(self.group.rank, data.num_windows, self.group.world_size)
        scores = []
        for window in map(data.read_window, progress(numbers, self.group, title="scoring")):
            answers, captions = evaluator.score_window(window)
            scores.append(WindowScores(answers, captions, window.left_out))
        return scores

    def _questions(self, data: ScorableData, results: Results) -> list[Any]:
        """All questions about the scored records, sorted by language so that `spread` takes a
        share of each."""
        usable = {row.index for row in results.answers} if self.num_generate else set()
        return sorted(data.questions(usable), key=lambda question: question.language)

    def _answer(
        self,
        evaluator: Evaluator,
        data: ScorableData,
        questions: Sequence[QuestionLike],
        sampling: Sampling,
    ) -> list[TextRow]:
        """This rank's generated answers."""
        chosen = spread(questions, self.num_generate)
        batches = list(self.group.batches(chosen, data.window))
        rows = []
        for batch in progress(batches, self.group, title="answering"):
            conversations = [data.messages(question) for question in batch]
            rows += evaluator.answer(batch, conversations, sampling)
        return rows

    def report(self, result: Results) -> dict[str, Any]:
        return build_report(result)

    def print_report(self, report: dict[str, Any]) -> None:
        print_report(report)

    def compare(self, first: Results, second: Results) -> dict[str, Any]:
        return compare(first, second)

    def print_difference(self, difference: dict[str, Any]) -> None:
        print_figures(difference)


def spread(items: Sequence[Any], num: int) -> list[Any]:
    """`num` of the items at equal distances, or all of them if there are no more."""
    return [items[i * len(items) // num] for i in range(num)] if num < len(items) else list(items)
