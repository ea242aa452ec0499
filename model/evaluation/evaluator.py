"""Owns what a model makes of evaluation data: losses under control images, captions told apart,
answers generated, options chosen. It takes built objects and knows no data set.

Shapes: I images, P patches, D hidden, S image side in pixels.
"""

from dataclasses import dataclass
from itertools import chain

import torch
from PIL import Image
from torch import Tensor

from model.evaluation.likelihood import AnswerScore, Row, score_candidates, score_rows
from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling

# The images: the record's own, another record's, plain grey ones, none (and no tags).
CONDITIONS = ("right", "shuffled", "grey", "blind")
GREY = (128, 128, 128)


@dataclass(frozen=True)
class AnswerRow:
    """An answer of the data set: how well the model foretells it under each condition."""

    index: int
    turn: int
    unit: tuple[str, ...]  # the images: records of the same ones are resampled together
    language: str
    type: str
    scores: dict[str, AnswerScore]


@dataclass(frozen=True)
class CaptionRow:
    """Whether the right caption of a picture is likelier than all wrong ones."""

    index: int
    unit: tuple[str, ...]
    language: str
    num_candidates: int
    is_right: dict[str, bool]  # with the right image, and with another record's


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


@dataclass(frozen=True)
class ChoiceRow:
    """The option chosen; in circular scoring it is right if it was under every order."""

    index: int
    category: str
    l2_category: str
    num_options: int
    answer: int
    chosen: int
    is_right: bool


class Evaluator:
    """Scores with one model.

    Args:
        batch_size: conversations, or images, in a forward pass.
    """

    def __init__(self, engine: VLMEngine, *, batch_size: int):
        self.engine, self.batch_size = engine, batch_size
        self.model, self.processor = engine.model, engine.processor
        side = self.processor.image_processor.crop_size
        grey = Image.new("RGB", (side["width"], side["height"]), GREY)
        self._grey = self.encode({"": self.processor.pixel_values([grey])[0]})[""]

    @torch.inference_mode()
    def encode(self, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        """(3, S, S) pictures to features (P, D), each picture once."""
        device, dtype = self.model.device, self.model.dtype
        pixels = list(pictures.values())
        batches = [
            self.model.encode_images(torch.stack(pixels[i : i + self.batch_size]).to(device, dtype))
            for i in range(0, len(pixels), self.batch_size)
        ]
        return dict(zip(pictures, chain.from_iterable(batches), strict=True))

    def score_window(self, window) -> tuple[list[AnswerRow], list[CaptionRow]]:
        """All answers of a window's records under all conditions, and their captions."""
        features = self.encode(window.pictures)
        rows, meant = [], []
        for case in window.cases:
            for condition, row in self._rows(case, features).items():
                rows.append(row)
                meant.append((case.card.index, condition))
        scored = score_rows(self.model, rows, batch_size=self.batch_size)
        by_case = dict(zip(meant, scored, strict=True))
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
        told = [self._tell_captions(case, features) for case in window.cases if case.candidates]
        return answers, told

    def _rows(self, case, features: dict[str, Tensor]) -> dict[str, Row]:
        """A record under each condition that there is."""
        images = {
            "right": [features[key] for key in case.card.images],
            "shuffled": [features[key] for key in case.others or ()],
            "grey": [self._grey] * len(case.card.images),
        }
        rows = {c: _row(case.sample, torch.stack(i)) for c, i in images.items() if i}
        return rows | {"blind": _row(case.blind, None)}

    def _tell_captions(self, case, features: dict[str, Tensor]) -> CaptionRow:
        is_right = {}
        for condition, keys in (("right", case.card.images), ("shuffled", case.others)):
            if keys:
                images = torch.stack([features[key] for key in keys])
                losses = [s.loss for s in self._score_candidates(case.candidates, images)]
                is_right[condition] = losses[0] < min(losses[1:])
        return CaptionRow(case.card.index, case.card.images, case.card.languages[0],
                          len(case.candidates), is_right)  # fmt: skip

    def _score_candidates(self, samples: list, images: Tensor) -> list[AnswerScore]:
        return score_candidates(self.model, [_row(sample, images) for sample in samples])

    def answer(self, questions: list, conversations: list, sampling: Sampling) -> list[TextRow]:
        """Generated answers, in batches of prompts of like length.

        Args:
            questions: with card, turn, language, is_caption, references.
            conversations: (messages, images) of each.
        """
        order = sorted(
            range(len(questions)), key=lambda i: sum(len(m["content"]) for m in conversations[i][0])
        )
        rows = []
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            answers = self.engine.generate([conversations[i] for i in some], sampling)
            for question, answer in zip((questions[i] for i in some), answers, strict=True):
                card = question.card
                rows.append(
                    TextRow(
                        card.index,
                        question.turn,
                        card.images,
                        question.language,
                        card.types[question.turn],
                        question.is_caption,
                        answer.text,
                        question.references,
                    )  # fmt: skip
                )
        return rows

    def choose_window(
        self, questions: list, *, mode: str, circular: bool, max_length: int
    ) -> tuple[list[ChoiceRow], list[str]]:
        """The likeliest options, per token of the option, of multiple-choice questions.

        Args:
            questions: `Choice` each. mode: as their `candidates` takes it.
            circular: ask with the options in every rotation; all must be right.
        Returns:
            The rows, and why the other questions could not be asked.
        """
        rows, left_out, pictures = [], [], {}
        for question in questions:
            try:
                pictures[question.index] = self.processor.pixel_values([question.image])[0]
            except ValueError as error:
                left_out.append(f"{question.where}: {error}")
        features = self.encode(pictures)
        for question in (q for q in questions if q.index in pictures):
            chosen = []
            try:
                for shift in range(len(question.options) if circular else 1):
                    samples = question.turned(shift).candidates(
                        self.processor, pictures[question.index][None], mode=mode,
                        max_length=max_length,
                    )  # fmt: skip
                    scores = self._score_candidates(samples, features[question.index][None])
                    losses = [score.loss for score in scores]
                    chosen.append((losses.index(min(losses)) + shift) % len(losses))
            except ValueError as error:
                left_out.append(str(error))
                continue
            rows.append(_choice_row(question, chosen))
        return rows, left_out


def _choice_row(question, chosen: list[int]) -> ChoiceRow:
    return ChoiceRow(
        index=question.index,
        category=question.category,
        l2_category=question.l2_category,
        num_options=len(question.options),
        answer=question.answer,
        chosen=chosen[0],
        is_right=all(option == question.answer for option in chosen),
    )


def _row(sample, features: Tensor | None) -> Row:
    return Row(sample.input_ids, sample.labels, sample.image_mask, features)
