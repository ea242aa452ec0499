"""Owns how an answer is generated: temperature, truncation, penalties, ends, thinking, beams."""

import argparse
import math
from dataclasses import dataclass
from typing import Any

from model.generations import DEFAULT_GENERATION, GENERATIONS
from model.options import parse_bool

MAX_SEED = 2**63 - 1
MAX_TOP_K = 1_000_000
MAX_BEAMS = 16
MAX_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-5  # below it only the likeliest token is drawn, and float32 may divide by 0
# Of draws, or of single answers: a beam search does not take them.
NOT_OF_BEAMS = (
    "min_p", "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
    "num_logprobs",
)  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated.

    Args:
        temperature: 0 is greedy decoding.
        top_p: nucleus sampling: the smallest set of tokens with at least this probability.
        top_k: only the k likeliest tokens; 0 is off.
        repetition_penalty: of tokens that prompt or answer already hold: positive logits are
            divided by it, negative ones multiplied; 1 is off.
        seed: of each answer's own random numbers; None draws a new one.
        open_thinking: the model thinks first; only one of a generation that can.
        num_beams: of beam search, which draws nothing: above 1 it needs temperature 0. 1 is none.
        length_penalty: of beam search: an answer's log probability is divided by its number of
            tokens to this power, as in transformers; 0 takes the sum, as the captioning papers do.
        min_p: only tokens of at least this share of the likeliest one's probability; 0 is off.
        presence_penalty: subtracted from the logits of tokens that the answer already holds.
        frequency_penalty: the same, once for each time that the answer holds the token.
        min_tokens: the answer does not end before it has so many.
        ignore_eos: the model's end token does not end the answer.
        stop_token_ids: tokens that end the answer too; the one that does is no part of the text.
        skip_special_tokens: False leaves special tokens in the text.
        num_logprobs: of so many of the likeliest tokens, and of the chosen one, log probabilities
            are kept, those that the model gives before penalties and temperature; None: of none.
    Raises:
        ValueError: a value is out of its range, or beams at a temperature above 0; the message
            names the flag.
    """

    max_new_tokens: int = 512
    temperature: float = 0.65
    top_p: float = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    open_thinking: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        def must(is_right: bool, name: str, wanted: str) -> None:
            if not is_right:
                raise ValueError(f"--{name} must be {wanted}; got {getattr(self, name)}")

        must(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        must(0 <= self.temperature < math.inf, "temperature", "at least 0 (0 is greedy)")
        if self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        must(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        must(0 <= self.top_k <= MAX_TOP_K, "top_k", f"0 (all tokens) to {MAX_TOP_K}")
        must(0.1 <= self.repetition_penalty <= 10, "repetition_penalty", "0.1 to 10 (1 is none)")
        must(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", f"from 0 to {MAX_SEED}")
        must(1 <= self.num_beams <= MAX_BEAMS, "num_beams", f"1 (no beam search) to {MAX_BEAMS}")
        must(-10 <= self.length_penalty <= 10, "length_penalty", "from -10 to 10")
        must(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        must(-2 <= self.presence_penalty <= 2, "presence_penalty", "from -2 to 2")
        must(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "from -2 to 2")
        wanted = f"from 0 to the longest answer, {self.max_new_tokens}"
        must(0 <= self.min_tokens <= self.max_new_tokens, "min_tokens", wanted)
        is_number = self.num_logprobs is None or 0 <= self.num_logprobs <= MAX_LOGPROBS
        must(is_number, "num_logprobs", f"from 0 to {MAX_LOGPROBS}")
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        if self.temperature > 0:
            raise ValueError(
                f"--num_beams {self.num_beams} searches and draws nothing: it needs --temperature "
                f"0; got {self.temperature}"
            )
        for name in NOT_OF_BEAMS:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"--{name} does not go with --num_beams {self.num_beams}; leave one of them out"
                )

    @property
    def decoding(self) -> dict[str, float]:
        """What a report says of how its answers were generated."""
        names = ("temperature", "num_beams", "length_penalty")
        return {name: getattr(self, name) for name in names}


DEFAULT_SEED = 2026


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `Sampling`; `sampling_from` reads them.

    Those whose default is the generation's are None where they are not given.
    """
    add = parser.add_argument
    add("--max_new_tokens", type=int, default=512, help="longest answer / 最大生成长度")
    add("--temperature", type=float, help=f"0 is greedy{_defaults('temperature')} / 采样温度")
    add("--top_p", type=float, help=f"nucleus sampling{_defaults('top_p')} / 核采样阈值")
    add("--top_k", type=int, help=f"likeliest tokens only{_defaults('top_k')} / 仅取前 k 个")
    add("--repetition_penalty", type=float, default=1.0, help="1 is none / 重复惩罚")
    add("--seed", type=int, default=DEFAULT_SEED, help="of the sampling / 随机种子")
    beams_help = f"beam search: 1 (none) to {MAX_BEAMS}, at temperature 0 by default / 束宽"
    add("--num_beams", type=int, default=1, help=beams_help)
    length_help = "of beam search: above 0 favours long answers, 0 is the papers' sum / 长度惩罚"
    add("--length_penalty", type=float, default=1.0, help=length_help)
    thinking_help = "think before answering (generation 3) / 先思考再回答（第三代）"
    add(
        "--open_thinking", type=parse_bool, nargs="?", const=True, default=False, help=thinking_help
    )


def _defaults(name: str) -> str:
    """A flag's default of each generation, for its help."""
    values = (f"{own.sampling[name]:g} in generation {n}" for n, own in GENERATIONS.items())
    return f"; default {', '.join(values)}"


def sampling_from(args: argparse.Namespace, generation: int | None = None) -> Sampling:
    """The `Sampling` of parsed flags.

    Args:
        generation: of the loaded weight, whose defaults stand for flags that are not given; None
            while none is loaded, to check the flags alone.
    Raises:
        ValueError: a flag out of its range, or thinking of a model that cannot.
    """
    own = GENERATIONS[DEFAULT_GENERATION if generation is None else generation]
    if args.open_thinking and generation is not None and not own.can_think:
        raise ValueError(f"--open_thinking 1: {cannot_think(generation)}")
    chosen: dict[str, Any] = dict(own.sampling)
    if args.num_beams > 1:
        chosen["temperature"] = 0.0
    chosen |= {name: v for name in chosen if (v := getattr(args, name)) is not None}
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        open_thinking=args.open_thinking,
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        **chosen,
    )


def cannot_think(generation: int) -> str:
    """Why a model does not take `open_thinking`, and what to do."""
    able = " or ".join(str(number) for number, own in GENERATIONS.items() if own.can_think)
    return (
        f"a model of generation {generation} does not think; set it to 0, or take a weight of "
        f"generation {able}"
    )
