"""Owns a data set prepared for evaluation: usable records, control images, wrong captions,
questions with their references.

The texts of all records are read once, at the beginning. Pictures are read a window of records at
a time.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random

import torch
from torch import Tensor

from dataset.evaluation.language import detect_language, num_words
from dataset.lm_dataset import Sample, VLMDataset, make_sample
from dataset.records.conversation import IMAGE_TAG, BadRecordError, Message, Record

SHORT_WORDS = 5  # longer answers on average: the question asks for sentences
CAPTION = "caption"  # the type of such a question
MAX_TRIES = 1000  # records examined to find one with other images
NUM_CONTROLS = 8  # pictures that tell how likely a caption is whatever is shown
PICTURES_HELD = 64


@dataclass(frozen=True)
class Card:
    """A record without its pictures; the tuples after `images` have one entry per answer."""

    index: int
    images: tuple[str, ...]  # names, or digests of the bytes
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    types: tuple[str, ...]  # "" where the record has none
    languages: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A record to score; its pictures are in its window, by their keys."""

    card: Card
    sample: Sample
    blind: Sample  # without images and their tags
    others: tuple[str, ...] | None  # keys of another record's images; None: there is no other
    candidates: list[Sample] = field(default_factory=list)  # the right caption, then wrong ones
    # Keys of the images of some records of which no candidate is.
    controls: list[tuple[str, ...]] = field(default_factory=list)


@dataclass
class RecordWindow:
    """Records that are scored together: `pictures` by key, (3, S, S) or the tower's features
    (G * G, V); `left_out` (reason, where)."""

    cases: list[Case] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """A question to the model, with all answers that the data set has for it."""

    card: Card
    turn: int
    language: str
    is_caption: bool
    references: list[str]


class EvalData:
    """The scorable records of a data set.

    Args:
        num_records: only the first so many; None: all.
        num_wrong: wrong captions for each right one.
        seed: chooses the wrong captions.
        window: records that are read together.
        answer_of: what of a record's answer is a reference, without what the model thinks first.
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
        answer_of: Callable[[str], str] = str,
    ):
        self._answer_of = answer_of
        self.dataset, self.num_wrong, self.seed, self.window = dataset, num_wrong, seed, window
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # reason -> the first record left out for it
        self.cards = self._read_cards(num_records or len(dataset))
        if not self.cards:
            why = next(iter(self.examples.values()))
            raise ValueError(f"{dataset.data_path}: no usable record with images ({why})")
        self._asks_for_sentences = _sentence_questions(self.cards)
        self._where = {
            key: (card.index, number)
            for card in reversed(self.cards)
            for number, key in enumerate(card.images)
        }
        # The first record of each picture and language that describes it.
        self._captions: dict[tuple[tuple[str, ...], str], Card] = {}
        for card in self.cards:
            if self.is_caption(card, 0):
                self._captions.setdefault((card.images, card.languages[0]), card)
        self._pool: defaultdict[str, list[Card]] = defaultdict(list)
        for (_, language), card in self._captions.items():
            self._pool[language].append(card)
        self._pixels = lru_cache(PICTURES_HELD)(self._read_pixels)

    def _read_cards(self, num_records: int) -> list[Card]:
        """The cards of the first records, of those that have images."""
        cards = []
        for index in range(min(len(self.dataset), num_records)):
            try:
                record = self.dataset.records[index]
            except BadRecordError as error:
                self._leave_out("broken", str(error))
                continue
            if record.images:
                cards.append(_card(index, record, answer_of=self._answer_of))
            else:
                self._leave_out("no images", record.where)
        return cards

    def _leave_out(self, reason: str, example: str) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, example)

    def is_caption(self, card: Card, turn: int) -> bool:
        """Whether an answer is a caption, so that other captions of the picture are references.

        Its type decides; without one, the only answer of a record is a caption if its question is
        answered by sentences.
        """
        if card.types[turn]:
            return card.types[turn] == CAPTION
        return len(card.answers) == 1 and card.questions[0] in self._asks_for_sentences

    @property
    def num_windows(self) -> int:
        return -(-len(self.cards) // self.window)

    def read_window(self, number: int) -> RecordWindow:
        """The usable records of a window with their pictures and control pictures."""
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
            for keys in filter(None, (case.card.images, case.others, *case.controls)):
                window.pictures.update(zip(keys, self._pictures_of(keys), strict=True))
        return window

    def _case(self, place: int) -> Case:
        card = self.cards[place]
        record = self.dataset.records[card.index]
        pictures = self._pictures_of(card.images)
        blind = [
            message | {"content": message["content"].replace(IMAGE_TAG, "").strip()}
            for message in record.messages
        ]
        others = self._other_images(card, start=place + len(self.cards) // 2, than=card.images)
        captions = self._wrong_captions(card)
        candidates = self._candidates(card, captions, record, pictures) if captions else []
        return Case(
            card=card,
            sample=self._sample(card, record.messages, pictures, record),
            blind=self._sample(card, blind, [], record),
            others=others,
            candidates=candidates,
            controls=self._controls(card, others, captions) if candidates else [],
        )

    def _sample(
        self, card: Card, messages: list[Message], pictures: list[Tensor], record: Record
    ) -> Sample:
        return make_sample(
            replace(record, messages=messages),
            as_images(pictures),
            self.dataset.processor,
            index=card.index,
            max_length=self.dataset.max_length,
        )

    def _read_pixels(self, key: str, index: int, number: int) -> Tensor:
        """(3, S, S) of a picture, or its features (G * G, V) where the data set has them."""
        record = self.dataset.records[index]
        try:
            image = self.dataset.read_picture(record.images[number])
            if isinstance(image, Tensor):
                return image
            return self.dataset.processor.pixel_values([image])[0]
        except (ValueError, OSError) as error:
            raise BadRecordError(f"{record.where}: {error} (image {key})") from error

    def _pictures_of(self, keys: tuple[str, ...]) -> list[Tensor]:
        """The images of a record, as `_read_pixels` gives each."""
        return [self._pixels(key, *self._where[key]) for key in keys]

    def _other_images(
        self, card: Card, *, start: int, than: Iterable[str]
    ) -> tuple[str, ...] | None:
        """Images of the first record from a place on that has as many, and none of some."""
        excluded = set(than)
        for step in range(min(len(self.cards), MAX_TRIES)):
            other = self.cards[(start + step) % len(self.cards)]
            if len(other.images) != len(card.images) or excluded & set(other.images):
                continue
            try:
                self._pictures_of(other.images)
            except BadRecordError:
                continue
            return other.images
        return None

    def _controls(
        self, card: Card, others: tuple[str, ...] | None, wrong: list[Card]
    ) -> list[tuple[str, ...]]:
        """Images of records spread over the data, the same for nearly all cards."""
        excluded = {*(others or ()), *(key for one in (card, *wrong) for key in one.images)}
        found: list[tuple[str, ...]] = []
        for number in range(NUM_CONTROLS):
            start = number * len(self.cards) // NUM_CONTROLS
            if images := self._other_images(card, start=start, than=excluded):
                found.append(images)
                excluded.update(images)
        return found

    def _candidates(
        self, card: Card, wrong: list[Card], record: Record, pictures: list[Tensor]
    ) -> list[Sample]:
        """The caption of a picture, then captions of other pictures in the same language; [] where
        one cannot be scored."""
        first = next(i for i, m in enumerate(record.messages) if m["role"] == "assistant")
        prompt = record.messages[:first]
        if sum(m["content"].count(IMAGE_TAG) for m in prompt) != len(pictures):
            return []
        samples = [
            self._sample(
                card,
                [*prompt, {"role": "assistant", "content": one.answers[0]}],
                pictures,
                record,
            )
            for one in (card, *wrong)
        ]
        return [] if any(sample.is_truncated for sample in samples) else samples

    def _wrong_captions(self, card: Card) -> list[Card]:
        """Up to `num_wrong` records with different captions of other pictures in the same language;
        of the first record of its images and language only."""
        if self._captions.get((card.images, card.languages[0])) is not card:
            return []
        pool = self._pool[card.languages[0]]
        rng, wrong, texts = Random(f"{self.seed}/{card.index}"), [], {card.answers[0]}
        for other in rng.sample(pool, min(len(pool), MAX_TRIES)):
            if len(wrong) == self.num_wrong:
                break
            if not set(other.images) & set(card.images) and other.answers[0] not in texts:
                wrong.append(other)
                texts.add(other.answers[0])
        return wrong

    def questions(self, usable: set[int]) -> list[Question]:
        """The questions about the records of these indices, for generated answers.

        Captions of the same images in the same language are the references of one question; so
        are answers to the same question about the same images.
        """
        groups: dict[tuple[tuple[str, ...], str, bool, str], Question] = {}
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

    def messages(self, question: Question) -> tuple[list[dict[str, str]], list[bytes | Tensor]]:
        """The conversation before an answer, earlier answers without thinking, and its images:
        their bytes, or features where the data set has them."""
        record = self.dataset.records[question.card.index]
        ends = [i for i, m in enumerate(record.messages) if m["role"] == "assistant"]
        before = [
            m | {"content": self._answer_of(m["content"])} if m["role"] == "assistant" else m
            for m in record.messages[: ends[question.turn]]
        ]
        num_images = sum(m["content"].count(IMAGE_TAG) for m in before)
        read = self.dataset.read_picture
        return before, [read(image) for image in record.images[:num_images]]


def as_images(pictures: list[Tensor]) -> list[Tensor] | Tensor:
    """Preprocessed pictures as one tensor (I, 3, S, S); a list where some are features."""
    if any(picture.ndim == 2 for picture in pictures):
        return pictures
    return torch.stack(pictures) if pictures else torch.zeros(0, 3, 1, 1)


def _sentence_questions(cards: list[Card]) -> set[str]:
    """The questions whose answers have more than `SHORT_WORDS` words on average."""
    lengths: defaultdict[str, list[int]] = defaultdict(list)
    for card in cards:
        for question, answer in zip(card.questions, card.answers, strict=True):
            lengths[question].append(num_words(answer))
    return {question for question, n in lengths.items() if sum(n) > SHORT_WORDS * len(n)}


def _card(index: int, record: Record, *, answer_of: Callable[[str], str]) -> Card:
    """The texts of a record and the keys of its images."""
    questions, answers, asked = [], [], ""
    for message in record.messages:
        if message["role"] == "assistant":
            questions.append(" ".join(asked.replace(IMAGE_TAG, "").split()))
            answers.append(answer_of(message["content"]))
        else:
            asked = message["content"]
    types = (*record.types, *[""] * len(answers))[: len(answers)]
    languages = tuple(detect_language(a, q) for a, q in zip(answers, questions, strict=True))
    images = tuple(
        image if isinstance(image, str) else hashlib.sha1(image).hexdigest()
        for image in record.images
    )
    return Card(index, images, tuple(questions), tuple(answers), types, languages)
