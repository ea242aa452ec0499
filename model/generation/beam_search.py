"""Owns beam search: the answers of a batch by `generate` of transformers, within our limits.

Source: Wu et al., "Google's Neural Machine Translation System" (2016), for the length penalty.

Shapes: B answers, T tokens of the padded prompts, A new tokens, N candidates of all beams.
"""

import copy
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from model.generation.decoding import AnswerState
from model.generation.sampling import Sampling
from model.model_vlm import MiniMindVLM

OF_IMAGES = ("pixel_values", "vision_features", "has_features")  # the rest is of tokens
MIN_SHARED_TOKENS = 16_384  # 16 beams of 1,024 tokens, however short the model's context


def shared_room(num_prompt_tokens: int, num_rows: int, *, max_tokens: int, name: str) -> int:
    """How many tokens an answer may have: as all beams, or all answers, of a request together hold
    at most one full context (or `MIN_SHARED_TOKENS`), many take no more memory than one.

    Args:
        num_prompt_tokens: of the longest prompt.
        num_rows: beams or answers that are computed together.
        max_tokens: of prompt and answer together, in the model's context.
        name: of what to lower, for the message.
    Raises:
        ValueError: there is no room for an answer.
    """
    room = max_tokens - num_prompt_tokens
    if num_rows == 1:
        return room
    held = max(max_tokens, MIN_SHARED_TOKENS)
    room = min(room, held // num_rows - num_prompt_tokens)
    if room < 1:
        what = "beams" if name == "num_beams" else "answers"
        raise ValueError(
            f"{num_rows} {what} with a prompt of {num_prompt_tokens:,} tokens hold more than "
            f"{held:,} tokens; lower {name}, shorten the question or use fewer images"
        )
    return room


class BeamDecoder:
    """A `Decoder` whose only step searches all answers to their end.

    The vision tower and the prompts run once, not once for each beam. An answer's tokens depend on
    its own prompt alone.

    Args:
        batch: of `VLMProcessor.prompt_batch`.
        answers: one for each row of the batch, in its order.
        sampling: greedy, with `num_beams` of 2 or more.
        cancel: once it is set, each answer ends as the best beam so far.
    """

    def __init__(
        self,
        model: MiniMindVLM,
        batch: dict[str, Tensor],
        answers: list[AnswerState],
        sampling: Sampling,
        *,
        eos_token_id: int,
        cancel: threading.Event | None,
    ):
        self.answers = answers
        self._model = copy.copy(model)  # the same modules and tensors
        # What a transformers folder says of sampling must not mix with the settings given here.
        self._model.generation_config = GenerationConfig()
        self._sampling, self._eos_token_id = sampling, eos_token_id
        self._inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        limits = torch.tensor([a.max_new_tokens for a in answers], device=model.device)
        self._ends = BeamEnds(limits, num_prompt_tokens=batch["input_ids"].shape[1], cancel=cancel)

    @property
    def is_done(self) -> bool:
        return not self._inputs

    has_arrived = False  # a step computes: it arrives with it

    def listen(self, _arrival: Callable[[], None]) -> bool:
        return False

    def cancel(self) -> None:
        """End answers that were not searched, without a token; nothing happens to others."""
        for answer in self.answers:
            answer.finish_reason = answer.finish_reason or "cancelled"
        self._inputs = {}

    def end(self, _answer: AnswerState) -> None:
        """As `cancel`: it has found all answers, or none."""
        self.cancel()

    @torch.inference_mode()
    def step(self) -> None:
        """Search all answers to their end; an error cancels them."""
        try:
            best = self._search().tolist()  # (B, A)
        except RuntimeError:
            self.cancel()  # frees the prompts: others may need memory while the error is reported
            raise
        for answer, ids in zip(self.answers, best, strict=True):
            answer.set_tokens(ids, eos_token_id=self._eos_token_id)
            if self._ends.is_cancelled:
                answer.finish_reason = "cancelled"
        self._inputs = {}

    def _prefill(self) -> Cache | None:
        """The cache of the prompts without their last token, repeated for each beam; None where
        they have no other."""
        if self._inputs["input_ids"].shape[1] == 1:
            return None
        inputs = {
            name: tensor if name in OF_IMAGES else tensor[:, :-1]
            for name, tensor in self._inputs.items()
        }
        cache: Cache = self._model(**inputs, use_cache=True, logits_to_keep=1).cache
        cache.batch_repeat_interleave(self._sampling.num_beams)
        return cache

    def _search(self) -> Tensor:
        """Each answer's new ids (B, A); an answer that ended earlier goes on with end tokens."""
        ids, mask = self._inputs["input_ids"], self._inputs["attention_mask"]
        first = ids.gather(1, mask.argmax(1, keepdim=True))
        # The repetition penalty counts what stands in a row, so padding must be a token it holds.
        ids = torch.where(mask.bool(), ids, first)  # (B, T)
        found = self._model.generate(
            ids,
            attention_mask=mask,
            image_mask=self._inputs["image_mask"],
            cache=self._prefill(),
            generation_config=GenerationConfig(
                max_new_tokens=max(answer.max_new_tokens for answer in self.answers),
                do_sample=False,
                num_beams=self._sampling.num_beams,
                length_penalty=float(self._sampling.length_penalty),
                eos_token_id=self._eos_token_id,
                pad_token_id=self._eos_token_id,
            ),
            logits_processor=_processors(self._sampling),
            stopping_criteria=StoppingCriteriaList([self._ends]),
        )
        assert isinstance(found, Tensor)
        return found[:, ids.shape[1] :]


def _processors(sampling: Sampling) -> LogitsProcessorList:
    penalty = float(sampling.repetition_penalty)
    wanted = [] if penalty == 1 else [RepetitionPenaltyLogitsProcessor(penalty)]
    return LogitsProcessorList(wanted)


class BeamEnds(StoppingCriteria):
    """Ends the beams of an answer at its own limit, and all beams once the search is cancelled.

    Args:
        limits: (B,) int64, most new tokens of each answer.
    """

    def __init__(self, limits: Tensor, *, num_prompt_tokens: int, cancel: threading.Event | None):
        self.is_cancelled = False
        self._limits, self._num_prompt_tokens, self._cancel = limits, num_prompt_tokens, cancel

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:  # type: ignore[override]
        """Which candidates (N, T + A) end here: (N,) bool."""
        if self._cancel is not None and self._cancel.is_set():
            self.is_cancelled = True
        num_new = input_ids.shape[1] - self._num_prompt_tokens
        has_ended = (self._limits <= num_new) | self.is_cancelled
        return has_ended.repeat_interleave(len(input_ids) // len(self._limits))
