"""Owns the published benchmarks: the columns of their files, how each asks and who counts as right.

The columns are those of the published files, as the pages named beside them declare them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from dataset.evaluation.multiple_choice import LETTERS, WORD, Choice, ChoiceFile, Layout, text_of
from dataset.evaluation.table import Row
from dataset.records.conversation import BadRecordError
from dataset.records.images import open_images
from dataset.records.reader import find_files

# VLMEvalKit writes the turned copies of question 7 as 1000007, 2000007, ...
TURNED = 10**6


def _turned(row: Row) -> Row:
    """MMBench: the copies of a question with its options turned have the question's `index`."""
    index = text_of(row.get("index"))
    return row | ({"question_id": str(int(index) % TURNED)} if index.isdecimal() else {})


def _yes_or_no(row: Row) -> Row:
    """POPE: a question without options, answered by yes or no."""
    answer = text_of(row.get("answer", row.get("label"))).lower()
    return {
        "question": row.get("question", row.get("text")),
        "A": "Yes",
        "B": "No",
        "answer": {"yes": "A", "no": "B"}.get(answer, f"{answer}: no yes or no"),
        "category": row.get("category"),
        "image": row.get("image"),
        "index": row.get("index"),
    }


def _listed(row: Row) -> Row:
    """ScienceQA: `choices` is a list and `answer` a position in it."""
    choices, answer = row.get("choices") or [], row.get("answer")
    is_position = isinstance(answer, int) and 0 <= answer < len(LETTERS)
    return dict(zip(LETTERS, choices, strict=False)) | {
        "question": row.get("question"),
        "hint": row.get("hint"),
        "answer": LETTERS[answer] if is_position else answer,
        "category": row.get("subject"),
        "l2_category": row.get("topic"),
        "image": row.get("image"),
    }


OPENCOMPASS = "https://opencompass.openxlab.space/utils/VLMEval"
LETTERED = ("question", "A", "B", "answer", "image")  # of each TSV of multiple choice


def _tsv(name: str, adapt: Callable[[Row], Row] = dict) -> Layout:
    return Layout(LETTERED, f"{OPENCOMPASS}/{name}", adapt)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    title: as tables call it. layouts: of its files. rule: how a generated answer is read; a key of
    `model.evaluation.answer_rules.RULES`. mode: how it asks, as `Choice.prompt` takes it.
    """

    title: str
    layouts: tuple[Layout, ...]
    rule: str = "letter"
    mode: str = "letter"

    @property
    def is_yes_or_no(self) -> bool:
        return self.mode == WORD


HUB = "https://huggingface.co/datasets"
BENCHMARKS = {
    "mmstar": Benchmark(
        "MMStar",
        (
            _tsv("MMStar.tsv"),
            Layout(
                ("question", "image", "answer", "category", "l2_category"),
                f"{HUB}/Lin-Chen/MMStar, mmstar.parquet",
            ),
        ),
    ),
    "mmbench": Benchmark(
        "MMBench",
        (
            Layout(
                ("index", *LETTERED),
                f"{OPENCOMPASS}/MMBench_DEV_EN.tsv and {HUB}/lmms-lab/MMBench",
                _turned,
            ),
        ),
    ),
    "ccbench": Benchmark("CCBench", (_tsv("CCBench.tsv", _turned),)),
    "seedbench": Benchmark("SEED-Bench, images", (_tsv("SEEDBench_IMG.tsv"),)),
    "ai2d": Benchmark("AI2D", (_tsv("AI2D_TEST.tsv"),)),
    "scienceqa": Benchmark(
        "ScienceQA, questions with a picture",
        (
            Layout(
                ("image", "question", "choices", "answer", "hint", "subject", "topic"),
                f"{HUB}/derek-thomas/ScienceQA and {HUB}/lmms-lab/ScienceQA",
                _listed,
            ),
            _tsv("ScienceQA_TEST.tsv"),
        ),
        rule="first letter",
    ),
    "pope": Benchmark(
        "POPE",
        (
            Layout(
                ("question", "answer", "image", "category"),
                f"{HUB}/lmms-lab/POPE and {OPENCOMPASS}/POPE.tsv",
                _yes_or_no,
            ),
            Layout(
                ("question_id", "image", "text", "label"),
                "https://github.com/AoiDragon/POPE, output/coco/coco_pope_random.json",
                _yes_or_no,
                names_images=True,
            ),
        ),
        rule="yes unless no",
        mode=WORD,
    ),
}


class BenchmarkData:
    """The questions of a benchmark's files, one after the other, as `ChoiceFile` gives them.

    Args:
        data_path: a file, or a folder or pattern of the parts of one, as hubs cut it.
        images_path: where a layout's pictures lie that are files of their own.
        num_records: only the first so many; None: all.
    Raises:
        FileNotFoundError, ValueError: as `ChoiceFile`, or the pictures are missing.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        data_path: Path,
        images_path: Path | None = None,
        *,
        num_records: int | None = None,
    ):
        images = open_images(images_path)
        self._num_records = num_records
        self._files = [
            ChoiceFile(path, flag="--data_path", layouts=benchmark.layouts, images=images)
            for path in find_files(data_path)
        ]

    def __iter__(self) -> Iterator[Choice | BadRecordError]:
        questions = (question for file in self._files for question in file)
        for index, question in enumerate(islice(questions, self._num_records)):
            yield question if isinstance(question, Exception) else replace(question, index=index)
