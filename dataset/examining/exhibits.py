"""Owns what a report shows of single records: pictures, answers, prompts with their tokens."""

import base64
import io
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from dataset.examining.examine import Examiner
from dataset.examining.tally import Tally
from dataset.lm_dataset import make_sample
from dataset.prompt_spans import Span, spans_of

THUMBNAIL_SIDE = 320  # pixels
MOST_PICTURES = 4  # of a record that are shown
LONGEST_PROMPT = 1500  # spans
LONGEST_ANSWER = 200  # characters


@dataclass(frozen=True)
class Exhibit:
    """A record to show: pictures as data URLs, its answers and, perhaps, its prompt's spans."""

    where: str
    pictures: tuple[str, ...]
    answer: str
    spans: tuple[Span, ...] = ()
    num_tokens: int = 0
    num_supervised: int = 0


Pair = tuple[Exhibit, Exhibit]


@dataclass(frozen=True)
class Shown:
    """What the page shows of single records."""

    samples: Sequence[Exhibit] = ()
    near_pictures: Sequence[Pair] = ()
    near_answers: Sequence[Pair] = ()
    leaks: Sequence[Pair] = ()
    frequent_answers: Sequence[tuple[Exhibit, int]] = ()


def data_url(picture: Image.Image) -> str:
    """A picture as a data URL, small."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def spread(indexes: Sequence[int], num: int) -> list[int]:
    """`num` of the indexes, evenly spread."""
    num = min(num, len(indexes))
    return [int(indexes[i * len(indexes) // num]) for i in range(num)]


def show_record(examiner: Examiner, index: int) -> Exhibit | None:
    """A record's pictures and answers; None where it has a fault by now."""
    sources = examiner.sources
    try:
        record = sources.record(index)
        contents = [sources.read_image(index, i) for i in record.images[:MOST_PICTURES]]
        limit = examiner.max_pixels
        pictures = [examiner.open_picture(content, max_pixels=limit) for content in contents]
    except (ValueError, OSError):
        return None
    answers = " / ".join(m["content"] for m in record.messages if m["role"] == "assistant")
    answer = answers if len(answers) <= LONGEST_ANSWER else answers[:LONGEST_ANSWER] + "..."
    return Exhibit(sources.where(index), tuple(map(data_url, pictures)), answer)


def show_prompt(examiner: Examiner, index: int) -> Exhibit | None:
    """A record with its prompt as training sees it."""
    shown = show_record(examiner, index)
    if shown is None:
        return None
    record = examiner.sources.record(index)
    images = [examiner.sources.read_image(index, image) for image in record.images]
    sample = make_sample(
        record, images, examiner.processor, index=index, max_length=examiner.max_length
    )
    spans = spans_of(sample, examiner.processor)
    num_supervised = sum(s.num_tokens for s in spans if s.kind == "supervised")
    return replace(
        shown,
        spans=tuple(spans[:LONGEST_PROMPT]),
        num_tokens=len(sample.input_ids),
        num_supervised=num_supervised,
    )


def show_pairs(
    left: Examiner, right: Examiner, indexes: Iterable[Sequence[int]]
) -> list[tuple[Exhibit, Exhibit]]:
    """Pairs of records, each of one data set and one of another."""
    shown = ((show_record(left, i), show_record(right, j)) for i, j in indexes)
    return [(a, b) for a, b in shown if a is not None and b is not None]


def choose_exhibits(
    examiner: Examiner, tally: Tally, figures: dict[str, Any], *, num: int
) -> Shown:
    """What the page shows of single records: `num` samples, near-duplicates, frequent answers."""
    order = spread(tally.record, 64 * num)
    random.Random(0).shuffle(order)  # neighbours may have the same picture
    samples = (show_prompt(examiner, index) for index in sorted(order[:num]))
    frequent = (
        (show_record(examiner, index), count)
        for index, count in figures["answers"]["most_frequent"]
    )
    return Shown(
        samples=[sample for sample in samples if sample is not None],
        near_pictures=show_pairs(examiner, examiner, figures["images"]["near_pairs"]),
        near_answers=show_pairs(examiner, examiner, figures["answers"]["near_pairs"]),
        frequent_answers=[(one, count) for one, count in frequent if one is not None],
    )
