"""Owns the options of an answer, as the page's parts give them."""

import random
from dataclasses import dataclass
from typing import Any

import gradio as gr

from model.generation.sampling import MAX_SEED, Sampling
from model.serving.web.layout import LIMITS
from model.serving.web.text import LANGUAGES

NUM_DRAWN_SEEDS = 2**31 - 1  # short enough to be copied by hand


@dataclass(frozen=True)
class Wish:
    """Options of an answer; `settings` are the seed's text (empty: a new one) and the sliders.

    `open_thinking` asks a model that can to think first; `ticket` is that under which the
    conversation is kept.
    """

    session: str
    weight: str
    language: str
    settings: tuple[Any, ...]
    open_thinking: bool = False
    ticket: str = ""

    @classmethod
    def of(
        cls, request: gr.Request, weight: str, language: str, ticket: str, *values: Any
    ) -> "Wish":
        """From the values of the page's parts."""
        *settings, thinks = values
        return cls(
            request.session_hash, weight, LANGUAGES[language], tuple(settings), bool(thinks), ticket
        )

    def sampling(self) -> Sampling:
        """Raises `ValueError` for a value out of its range."""
        wanted, *values = self.settings
        wanted = wanted.strip()
        if wanted and not (wanted.isdecimal() and int(wanted) <= MAX_SEED):
            raise ValueError(f"the seed {wanted[:20]!r} is no whole number from 0 to {MAX_SEED}")
        seed = int(wanted) if wanted else random.randrange(NUM_DRAWN_SEEDS)
        whole = (step == 1 for _, _, step in LIMITS.values())
        values = [int(v) if is_whole else v for v, is_whole in zip(values, whole, strict=True)]
        chosen = dict(zip(LIMITS, values, strict=True))
        if chosen["num_beams"] > 1:  # as the slider's label says
            chosen["temperature"] = 0
        return Sampling(**chosen, seed=seed)
