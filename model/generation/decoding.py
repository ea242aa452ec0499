"""Owns the decoding loop: answers token by token over a key-value cache, and ids to text.

Shapes: B unfinished answers, T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.generation.key_values import KeyValues
from model.generation.sampler import Sampler
from model.generation.token_step import TokenStep
from model.model_vlm import MiniMindVLM

REPLACEMENT = "\ufffd"  # what the tokenizer writes for bytes that are not a whole character


class TokenScore(NamedTuple):
    """A token of an answer, and what the model says of it: natural logarithms of probabilities."""

    token_id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]  # ids and their own, in falling order


class AnswerState:
    """One answer while it is generated.

    Args:
        num_prompt_tokens: without padding.
        max_new_tokens: must fit in the context behind the prompt.
    """

    def __init__(self, num_prompt_tokens: int, *, max_new_tokens: int):
        self.num_prompt_tokens, self.max_new_tokens = num_prompt_tokens, max_new_tokens
        self.new_ids: list[int] = []
        self.scores: list[TokenScore] = []  # of the new tokens, where the settings ask for them
        self.finish_reason: str | None = None  # "stop", "length" or "cancelled"

    def add_token(self, token: int, *, end_ids: Collection[int]) -> None:
        """Append a token; sets `finish_reason` if it is the last one."""
        self.new_ids.append(token)
        if token in end_ids:
            self.finish_reason = "stop"
        elif len(self.new_ids) == self.max_new_tokens:
            self.finish_reason = "length"

    def set_tokens(self, ids: list[int], *, eos_token_id: int) -> None:
        """Take a whole answer, found elsewhere; what stands behind its end or limit is dropped."""
        ids = ids[: self.max_new_tokens]
        has_end = eos_token_id in ids
        self.new_ids = ids[: ids.index(eos_token_id) + 1] if has_end else ids
        self.finish_reason = "stop" if has_end else "length"

    @property
    def text_ids(self) -> list[int]:
        """The new tokens that are text: without the one that ended the answer."""
        return self.new_ids[:-1] if self.finish_reason == "stop" else self.new_ids


class Decoder:
    """Generates the answers of a batch; each step adds one token to every unfinished answer.

    An answer's tokens depend on its own prompt and seed alone. Steps may run in different threads,
    but only one at a time; several decoders may share a model.

    Args:
        batch: of `VLMProcessor.prompt_batch`.
        answers: for each row of the batch, in its order, one or the same number of several: those
            of one row follow one another. The prompts are computed once all the same.
        sampler: of these answers.
        step: of the same model.
        num_logprobs: as of `Sampling`.
    """

    def __init__(
        self,
        model: MiniMindVLM,
        step: TokenStep,
        batch: dict[str, Tensor],
        answers: list[AnswerState],
        sampler: Sampler,
        *,
        end_ids: Collection[int],
        num_logprobs: int | None = None,
    ):
        self.answers = answers
        self._active = list(answers)
        self._model, self._step, self._sampler = model, step, sampler
        self._end_ids, self._num_logprobs = frozenset(end_ids), num_logprobs
        self._inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        self._cache: KeyValues | None = None
        self._newest: Tensor | None = None  # (B,) tokens that the model has not seen

    @property
    def is_done(self) -> bool:
        return not self._active

    has_arrived = False  # a step computes: it arrives with it

    def listen(self, _arrival: Callable[[], None]) -> bool:
        return False

    def cancel(self) -> None:
        """End the unfinished answers with the tokens they have, and free the cache."""
        for answer in self._active:
            answer.finish_reason = "cancelled"
        self._active, self._inputs, self._cache = [], {}, None

    @torch.inference_mode()
    def end(self, answer: AnswerState) -> None:
        """End one answer with the tokens it has, between two steps; a finished one stays."""
        if answer.finish_reason is None:
            answer.finish_reason = "cancelled"
            self._drop_finished()

    @torch.inference_mode()
    def step(self) -> None:
        """Add a token to every unfinished answer; an error cancels them all."""
        try:
            logits = self._forward()
            tokens = self._sampler.choose(logits)
            scores = token_scores(logits, tokens, num_likeliest=self._num_logprobs)
            chosen = tokens.tolist()
        except RuntimeError:
            self.cancel()  # frees the cache: others may need it while the error is reported
            raise
        self._newest = tokens
        for answer, token in zip(self._active, chosen, strict=True):
            answer.add_token(token, end_ids=self._end_ids)
        for answer, score in zip(self._active, scores, strict=False):
            answer.scores.append(score)
        self._drop_finished()

    def _drop_finished(self) -> None:
        """Finished answers leave the batch."""
        unfinished = [i for i, a in enumerate(self._active) if a.finish_reason is None]
        if len(unfinished) == len(self._active):
            return
        self._active = [self._active[i] for i in unfinished]
        if not unfinished:
            self._inputs, self._cache = {}, None
        else:
            assert self._cache is not None and self._newest is not None, "before the first step"
            self._cache.select(unfinished)
            self._newest = self._newest[torch.tensor(unfinished, device=self._newest.device)]
            self._sampler.select(unfinished)

    def _forward(self) -> Tensor:
        """Logits (B, V) of the next tokens, in float32."""
        if self._cache is not None:
            assert self._newest is not None
            return self._step(self._newest, self._cache).float()
        output = self._model(**self._inputs, use_cache=True, logits_to_keep=1)
        num_choices = len(self._active) // len(output.logits)
        self._cache = KeyValues(
            output.cache,
            [answer.num_prompt_tokens for answer in self._active],
            max_new_tokens=max(answer.max_new_tokens for answer in self._active),
        )
        self._inputs = {}
        logits: Tensor = output.logits[:, -1].float()
        return logits.repeat_interleave(num_choices, 0)


def token_scores(logits: Tensor, tokens: Tensor, *, num_likeliest: int | None) -> list[TokenScore]:
    """What the model says, by its logits (B, V), of the chosen tokens (B,).

    Args:
        num_likeliest: `num_logprobs` of `Sampling`; None gives nothing.
    """
    if num_likeliest is None:
        return []
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(num_likeliest, logprobs.shape[1]))
    rows = zip(tokens.tolist(), own, ids.tolist(), values.tolist(), strict=True)
    return [TokenScore(t, p, tuple(zip(i, v, strict=True))) for t, p, i, v in rows]


class TextPieces:
    """Decodes one answer's tokens as they come, in pieces of whole characters.

    A character's bytes may come in several tokens: they are held back until it is complete. The
    pieces joined are the decoded answer, without an incomplete character at its end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True):
        self._tokenizer, self._skips_special = tokenizer, skip_special_tokens
        self._waiting: list[int] = []  # ids since the last character boundary
        self._num_returned = 0  # characters of theirs returned already

    def push(self, token: int) -> str:
        """The characters that this token completes; "" if none."""
        self._waiting.append(token)
        text = self._tokenizer.decode(
            self._waiting,
            skip_special_tokens=self._skips_special,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)  # of one sequence; a batch would give a list
        whole = text.removesuffix(REPLACEMENT)
        piece = whole[self._num_returned :]
        if whole == text:
            self._waiting, self._num_returned = [], 0
        else:
            self._num_returned = len(whole)
        return piece
