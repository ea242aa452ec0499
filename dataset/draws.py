"""Owns what is random about a training sample, drawn from seed, epoch and sample alone.

So a resumed run, and any split over processes and micro-steps, draws the same.
"""

from dataclasses import dataclass

import numpy as np

STREAM = 0x5A3D1E  # keeps these numbers apart from others that are drawn from seed and epoch
SYSTEM_MESSAGES = (
    "You are a helpful AI assistant.",
    "You are a small model that looks at pictures and answers questions about them.",
    "You are a friendly assistant. Answer clearly and stay with the facts.",
    "As an assistant, give the user answers that are correct and useful.",
    "You are a careful assistant: read the question, then answer it in plain words.",
    "你是一个乐于助人的AI助手。",
    "你是一个小型图文模型，能看图片并回答问题。",
    "你是一个友好的助手，请清楚、如实地回答。",
    "作为助手，请给用户正确而有用的回答。",
    "你是一个细心的助手，请先读懂问题，再用简洁的语言回答。",
)


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one sample: a system message to add, if any, and whether empty think
    blocks stay. As it stands, nothing is changed."""

    system: str | None = None
    keep_empty_thinking: bool = True


@dataclass(frozen=True)
class Draws:
    """Draws for each sample of an epoch.

    Args:
        seed: the run's, not negative.
        system_share: probability of a system message where the sample has none and no tools.
        empty_think_share: probability that the empty think blocks of a sample stay.
    Raises:
        ValueError: a share outside 0 to 1.
    """

    seed: int
    system_share: float
    empty_think_share: float

    def __post_init__(self) -> None:
        for name in ("system_share", "empty_think_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"--{name} {share} is a probability; give 0 to 1")

    @property
    def change_nothing(self) -> bool:
        """Whether every sample stays as it is, whatever is drawn."""
        return self.system_share == 0 and self.empty_think_share == 1

    def of(self, epoch: int, index: int) -> Drawn:
        """What is drawn for a sample (its number in the data set) in an epoch (from 0)."""
        dice = np.random.default_rng((STREAM, self.seed, epoch, index))
        adds, which, keeps = dice.random(3)
        system = SYSTEM_MESSAGES[int(which * len(SYSTEM_MESSAGES))]
        return Drawn(
            system=system if adds < self.system_share else None,
            keep_empty_thinking=bool(keeps < self.empty_think_share),
        )
