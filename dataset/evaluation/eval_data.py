"""Owns what evaluation asks of a data set: usable records, control images, wrong captions,
questions with their references.

Records are read once for their texts; pictures only when they are asked for, a window of records
at a time.
"""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random

import torch
from torch import Tensor

from dataset.evaluation.language import detect_language, num_words
from dataset.lm_dataset import Sample, VLMDataset, make_sample
from dataset.records.conversation import IMAGE_TAG, BadRecordError, Record

SHORT_WORDS = 5  # a question whose answers have more on average asks for sentences
CAPTION = "caption"  # the type of such a question
MAX_TRIES = 1000  # records looked at for one with other images
PICTURES_HELD = 64


@dataclass(frozen=True)
class Card:
    """A record without its pictures; one entry per answer in the tuples behind `images`."""

    index: int
    images: tuple[str, ...]  # names, or digests of the bytes
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    types: tuple[str, ...]  # "" where the record says none
    languages: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A record ready to be scored; pictures are looked up in the window by their keys."""

    card: Card
    sample: Sample
    blind: Sample  # without images and their tags
    others: tuple[str, ...] | None  # keys of another record's images; None: there is no other
    candidates: list[Sample] = field(default_factory=list)  # the right caption, then wrong ones


@dataclass
class RecordWindow:
    """Records that are scored together: `pictures` (3, S, S) by key; `left_out` reason, where."""

    cases: list[Case] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """What the model is asked, with all answers the data set knows."""

    card: Card
    turn: int
    language: str
    is_caption: bool
    references: list[str]


class EvalData:
    """The scorable records of a data set.

    Args:
        num_records: only the first so many; None: all.
        num_wrong: wrong captions beside a right one.
        seed: of the choice of wrong captions.
        window: records that are read together.
    Raises:
        ValueError: no usable record with images.
    """

    def __init__(
        self,
        dataset: VLMDataset,
        *,
        num_records: int | None,
        num_wrong: int,
        seed: int,
        window: int,
    ):
        self.dataset, self.num_wrong, self.seed, self.window = dataset, num_wrong, seed, window
        self.left_out: Counter = Counter()
        self.cards: list[Card] = []
        self.examples: dict[str, str] = {}  # reason -> the first record left out for it
        for index in range(min(len(dataset), num_records or len(dataset))):
            try:
                record = dataset.records[index]
            except BadRecordError as error:
                self._leave_out("broken", str(error))
                continue
            if record.images:
                self.cards.append(_card(index, record))
            else:
                self._leave_out("no images", record.where)
        if not self.cards:
            why = next(iter(self.examples.values()))
            raise ValueError(f"{dataset.data_path}: no usable record with images ({why})")
        lengths = defaultdict(list)  # of the answers to each question
        for card in self.cards:
            for question, answer in zip(card.questions, card.answers, strict=True):
                lengths[question].append(num_words(answer))
        self._asks_for_sentences = {q for q, n in lengths.items() if sum(n) > SHORT_WORDS * len(n)}
        self._where = {
            key: (card.index, number)
            for card in reversed(self.cards)
            for number, key in enumerate(card.images)
        }
        # The first record of each picture and language that describes it.
        self._captions: dict[tuple, Card] = {}
        for card in self.cards:
            if self.is_caption(card, 0):
                self._captions.setdefault((card.images, card.languages[0]), card)
        self._pool = defaultdict(list)
        for (_, language), card in self._captions.items():
            self._pool[language].append(card)
        self._pixels = lru_cache(PICTURES_HELD)(self._read_pixels)

    def _leave_out(self, reason: str, example: str) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, example)

    def is_caption(self, card: Card, turn: int) -> bool:
        """Whether an answer describes the picture as others of the same picture do: by its type,
        else if it is the only one of its record, to a question that is answered by sentences."""
        if card.types[turn]:
            return card.types[turn] == CAPTION
        return len(card.answers) == 1 and card.questions[0] in self._asks_for_sentences

    @property
    def num_windows(self) -> int:
        return -(-len(self.cards) // self.window)

    def read_window(self, number: int) -> RecordWindow:
        """The usable records of a window with the pictures that they need."""
        window, start = RecordWindow(), number * self.window
        for place in range(start, min(start + self.window, len(self.cards))):
            try:
                case = self._case(place)
            except BadRecordError as error:
                window.left_out.append(("broken", str(error)))
                continue
            if case.sample.is_truncated:
                window.left_out.append(("too long", case.sample.where))
                continue
            window.cases.append(case)
            window.pictures.update(zip(case.card.images, case.sample.pixel_values, strict=True))
            if case.others:
                others = self._pictures_of(case.others)
                window.pictures.update(zip(case.others, others, strict=True))
        return window

    def _case(self, place: int) -> Case:
        card = self.cards[place]
        record = self.dataset.records[card.index]
        pixels = self._pictures_of(card.images)
        blind = [m | {"content": m["content"].replace(IMAGE_TAG, "").strip()}
                 for m in record.messages]  # fmt: skip
        return Case(
            card=card,
            sample=self._sample(card, record.messages, pixels, record),
            blind=self._sample(card, blind, pixels[:0], record),
            others=self._other_images(place),
            candidates=self._candidates(card, record, pixels),
        )

    def _sample(self, card: Card, messages: list[dict], pixels: Tensor, record: Record) -> Sample:
        return make_sample(replace(record, messages=messages), pixels, self.dataset.processor,
                           index=card.index, max_length=self.dataset.max_length)  # fmt: skip

    def _read_pixels(self, key: str, index: int, number: int) -> Tensor:
        record = self.dataset.records[index]
        try:
            image = self.dataset.records.read_image(record.images[number])
            return self.dataset.processor.pixel_values([image])[0]
        except (ValueError, OSError) as error:
            raise BadRecordError(f"{record.where}: {error} (image {key})") from error

    def _pictures_of(self, keys: tuple[str, ...]) -> Tensor:
        """(I, 3, S, S) of the images of a record."""
        return torch.stack([self._pixels(key, *self._where[key]) for key in keys])

    def _other_images(self, place: int) -> tuple[str, ...] | None:
        """The images of a record half the data set away: as many, and all of them others."""
        card, half = self.cards[place], len(self.cards) // 2
        for step in range(min(len(self.cards), MAX_TRIES)):
            other = self.cards[(place + half + step) % len(self.cards)]
            if len(other.images) != len(card.images) or set(other.images) & set(card.images):
                continue
            try:
                self._pictures_of(other.images)
            except BadRecordError:
                continue
            return other.images
        return None

    def _candidates(self, card: Card, record: Record, pixels: Tensor) -> list[Sample]:
        """The caption of a picture and those of others in the same language.

        Only for the first record of its images and language.
        """
        if self._captions.get((card.images, card.languages[0])) is not card:
            return []
        pool = self._pool[card.languages[0]]
        rng, texts = Random(f"{self.seed}/{card.index}"), [card.answers[0]]
        for other in rng.sample(pool, min(len(pool), MAX_TRIES)):
            if len(texts) > self.num_wrong:
                break
            if not set(other.images) & set(card.images) and other.answers[0] not in texts:
                texts.append(other.answers[0])
        if len(texts) == 1:
            return []
        first = next(i for i, m in enumerate(record.messages) if m["role"] == "assistant")
        prompt = record.messages[:first]
        if sum(m["content"].count(IMAGE_TAG) for m in prompt) != len(pixels):
            return []
        samples = [self._sample(card, [*prompt, {"role": "assistant", "content": text}], pixels,
                                record) for text in texts]  # fmt: skip
        return [] if any(s.is_truncated for s in samples) else samples

    def questions(self, usable: set[int]) -> list[Question]:
        """What to ask for generated answers about the records of these indices.

        Captions of the same images in the same language are references of one another; so are
        answers to the same question about the same images.
        """
        groups: dict[tuple, Question] = {}
        for card in (card for card in self.cards if card.index in usable):
            for turn, answer in enumerate(card.answers):
                language, is_caption = card.languages[turn], self.is_caption(card, turn)
                about = "" if is_caption else card.questions[turn]
                key = (card.images, language, is_caption, about)
                if key in groups:
                    groups[key].references.append(answer)
                else:
                    groups[key] = Question(card, turn, language, is_caption, [answer])
        return list(groups.values())

    def messages(self, question: Question) -> tuple[list[dict], list[bytes]]:
        """The conversation up to an answer, and the images in it."""
        record = self.dataset.records[question.card.index]
        ends = [i for i, m in enumerate(record.messages) if m["role"] == "assistant"]
        before = record.messages[: ends[question.turn]]
        num_images = sum(m["content"].count(IMAGE_TAG) for m in before)
        read = self.dataset.records.read_image
        return before, [read(image) for image in record.images[:num_images]]


def _card(index: int, record: Record) -> Card:
    """What is kept of a record."""
    questions, answers, asked = [], [], ""
    for message in record.messages:
        if message["role"] == "assistant":
            questions.append(" ".join(asked.replace(IMAGE_TAG, "").split()))
            answers.append(message["content"])
        else:
            asked = message["content"]
    types = (*record.types, *[""] * len(answers))[: len(answers)]
    languages = tuple(detect_language(a, q) for a, q in zip(answers, questions, strict=True))
    images = tuple(
        image if isinstance(image, str) else hashlib.sha1(image).hexdigest()
        for image in record.images
    )
    return Card(index, images, tuple(questions), tuple(answers), types, languages)
