"""Owns running a model on evaluation data: losses under control images, the right caption ranked
among wrong ones, generated answers. It knows the shape of the data's objects, but no data set.

Shapes: I images, P patches, D hidden, S image side in pixels; G patches along a side and V width of
the vision tower.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from model.evaluation.likelihood import (
    AnswerScore,
    LabelledSequence,
    score_candidates,
    score_sequences,
)
from model.evaluation.think_block import without_blocks
from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling
from model.generation.thinking import without_thinking

# Images shown: the record's own, another record's, plain grey ones, none (and no image tags).
CONDITIONS = ("right", "shuffled", "grey", "blind")
GREY = (128, 128, 128)
K = TypeVar("K")  # key of a picture


class SampleLike(Protocol):
    """A tokenized conversation: ids and labels (T,) int64, image_mask (T,) bool."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def image_mask(self) -> Tensor: ...


class CardLike(Protocol):
    """A record's texts and the keys of its images; answers, types, languages go together."""

    @property
    def index(self) -> int: ...

    @property
    def images(self) -> tuple[str, ...]: ...

    @property
    def answers(self) -> tuple[str, ...]: ...

    @property
    def types(self) -> tuple[str, ...]: ...

    @property
    def languages(self) -> tuple[str, ...]: ...


class CaseLike(Protocol):
    """A record to score, the same without images, and the keys of another record's images; a
    caption also with wrong captions, and the keys of the images of some more records."""

    @property
    def card(self) -> CardLike: ...

    @property
    def sample(self) -> SampleLike: ...

    @property
    def blind(self) -> SampleLike: ...

    @property
    def others(self) -> tuple[str, ...] | None: ...

    @property
    def candidates(self) -> Sequence[SampleLike]: ...

    @property
    def controls(self) -> Sequence[tuple[str, ...]]: ...


class WindowLike(Protocol):
    """Records that are scored together, their pictures (3, S, S), or what the tower says of them
    (G * G, V), by key, and (reason, where) of those left out."""

    @property
    def cases(self) -> Sequence[CaseLike]: ...

    @property
    def pictures(self) -> Mapping[str, Tensor]: ...

    @property
    def left_out(self) -> list[tuple[str, str]]: ...


class QuestionLike(Protocol):
    """A question about a record, with all answers that the data set holds."""

    @property
    def card(self) -> CardLike: ...

    @property
    def turn(self) -> int: ...

    @property
    def language(self) -> str: ...

    @property
    def is_caption(self) -> bool: ...

    @property
    def references(self) -> list[str]: ...


@dataclass(frozen=True)
class AnswerRow:
    """An answer of the data set, scored under each condition."""

    index: int
    turn: int
    unit: tuple[str, ...]  # keys of the images; the bootstrap draws their records together
    language: str
    type: str
    scores: dict[str, AnswerScore]


@dataclass(frozen=True)
class CaptionRow:
    """Whether the right caption of a picture has a lower loss per token than every wrong one, and
    whether it gains most from the picture.

    What a caption gains is its likelihood divided by its mean likelihood under other pictures:
    some captions are likely whatever is shown. Source: Mao et al., "Deep Captioning with
    Multimodal Recurrent Neural Networks" (2015), who retrieve captions by this.
    """

    index: int
    unit: tuple[str, ...]
    language: str
    num_candidates: int
    is_right: dict[str, bool]  # with the right image, and with another record's
    gains_most: dict[str, bool]  # the same; empty without other pictures to compare with


@dataclass(frozen=True)
class TextRow:
    """A generated answer beside its references."""

    index: int
    turn: int
    unit: tuple[str, ...]
    language: str
    type: str
    is_caption: bool
    answer: str
    references: list[str]


class Evaluator:
    """Scores with one model.

    Args:
        batch_size: conversations, or images, in a forward pass.
    """

    def __init__(self, engine: VLMEngine, *, batch_size: int):
        self.engine, self.batch_size = engine, batch_size
        self.model, self.processor = engine.model, engine.processor
        side = self.processor.pixel_range.side
        grey = Image.new("RGB", (side, side), GREY)
        self._grey = self.encode({"": self.processor.pixel_values([grey])[0]})[""]

    @torch.inference_mode()
    def encode(self, pictures: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """(3, S, S) pictures, or (G * G, V) of the tower, to features (P, D), each picture once."""
        encoded = {}
        for num_axes in (2, 3):
            keys = [key for key, picture in pictures.items() if picture.ndim == num_axes]
            for start in range(0, len(keys), self.batch_size):
                some = keys[start : start + self.batch_size]
                batch = torch.stack([pictures[key] for key in some])
                batch = batch.to(self.model.device, self.model.dtype)
                seen = {"vision_features": batch} if num_axes == 2 else {}
                images = self.model.encode_images(None if seen else batch, **seen)
                encoded |= dict(zip(some, images, strict=True))
        return encoded

    def score_window(self, window: WindowLike) -> tuple[list[AnswerRow], list[CaptionRow]]:
        """All answers of a window's records under all conditions, and their captions."""
        features = self.encode(window.pictures)
        sequences, keys = [], []
        for case in window.cases:
            for condition, sequence in self._sequences(case, features).items():
                sequences.append(sequence)
                keys.append((case.card.index, condition))
        scored = score_sequences(self.model, sequences, batch_size=self.batch_size)
        by_case = dict(zip(keys, scored, strict=True))
        answers = [
            AnswerRow(
                index=card.index,
                turn=turn,
                unit=card.images,
                language=card.languages[turn],
                type=card.types[turn],
                scores={
                    condition: by_case[card.index, condition][turn]
                    for condition in CONDITIONS
                    if (card.index, condition) in by_case
                },
            )
            for card in (case.card for case in window.cases)
            for turn in range(len(card.answers))
        ]
        captions = [self._rank_caption(case, features) for case in window.cases if case.candidates]
        return answers, captions

    def _sequences(
        self, case: CaseLike, features: dict[str, Tensor]
    ) -> dict[str, LabelledSequence]:
        """A record under each condition; "shuffled" is missing where no other record has images."""
        images = {
            "right": [features[key] for key in case.card.images],
            "shuffled": [features[key] for key in case.others or ()],
            "grey": [self._grey] * len(case.card.images),
        }
        sequences = {
            condition: self._sequence(case.sample, torch.stack(some))
            for condition, some in images.items()
            if some
        }
        return sequences | {"blind": self._sequence(case.blind, None)}

    def _sequence(self, sample: SampleLike, features: Tensor | None) -> LabelledSequence:
        """A conversation whose answers are scored without their think blocks."""
        sequence = labelled_sequence(sample, features)
        if not self.engine.can_think:
            return sequence
        labels = without_blocks(sequence.labels, self.processor.tokenizer)
        return replace(sequence, labels=labels)

    def _rank_caption(self, case: CaseLike, features: dict[str, Tensor]) -> CaptionRow:
        card = case.card
        conditions = {"right": card.images} | ({"shuffled": case.others} if case.others else {})
        shown = torch.stack(
            [
                torch.stack([features[key] for key in keys])
                for keys in (*conditions.values(), *case.controls)
            ]
        )
        scores = self.score_candidates(case.candidates, shown)
        losses = torch.tensor([[score.loss for score in row] for row in scores])
        sums = torch.tensor([[score.loss_sum for score in row] for row in scores])
        own, controls = sums[: len(conditions)], sums[len(conditions) :]
        # Losses are negative log likelihoods; a constant for all captions does not matter.
        usual = -torch.logsumexp(-controls, 0)
        return CaptionRow(
            index=card.index,
            unit=card.images,
            language=card.languages[0],
            num_candidates=len(case.candidates),
            is_right=dict(
                zip(conditions, _is_first_lowest(losses[: len(conditions)]), strict=True)
            ),
            gains_most=dict(
                zip(conditions, _is_first_lowest(own - usual), strict=True) if len(controls) else ()
            ),
        )

    def score_candidates(
        self, samples: Sequence[SampleLike], features: Tensor
    ) -> list[list[AnswerScore]]:
        """Scores of several answers to one prompt, for each of S alternatives of its images'
        features (S, I, P, D)."""
        sequences = [self._sequence(sample, None) for sample in samples]
        at_once = max(1, self.batch_size // len(sequences))
        return [
            scores
            for some in features.split(at_once)
            for scores in score_candidates(self.model, sequences, some)
        ]

    def answer(
        self,
        questions: Sequence[QuestionLike],
        conversations: Sequence[tuple[list[dict[str, str]], list[bytes | Tensor]]],
        sampling: Sampling,
    ) -> list[TextRow]:
        """Generated answers, in batches of prompts of similar length.

        Args:
            conversations: (messages, images) of each question.
        """
        order = sorted(
            range(len(questions)), key=lambda i: sum(len(m["content"]) for m in conversations[i][0])
        )
        rows = []
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            answers = self.engine.generate([conversations[i] for i in some], sampling)
            for question, answer in zip((questions[i] for i in some), answers, strict=True):
                text = without_thinking(answer.text) if self.engine.can_think else answer.text
                rows.append(_text_row(question, text))
        return rows


def _is_first_lowest(losses: Tensor) -> list[bool]:
    """Of each row (S, N), whether the first is lower than all others."""
    return (losses[:, 0] < losses[:, 1:].amin(1)).tolist()


def _text_row(question: QuestionLike, answer: str) -> TextRow:
    return TextRow(
        index=question.card.index,
        turn=question.turn,
        unit=question.card.images,
        language=question.language,
        type=question.card.types[question.turn],
        is_caption=question.is_caption,
        answer=answer,
        references=question.references,
    )


def labelled_sequence(sample: SampleLike, features: Tensor | None) -> LabelledSequence:
    return LabelledSequence(sample.input_ids, sample.labels, sample.image_mask, features)
