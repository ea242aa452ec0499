"""Owns how an answer is written token by token: sampling, the loop over the cache, text pieces.

Shapes: B rows still being written, T tokens, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.model_vlm import MiniMindVLM

MAX_SEED = 2**63 - 1
MAX_TOP_K = 1_000_000
HALF = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 is greedy. top_p: the nucleus. top_k: 0 takes all.
        repetition_penalty: divides the logits of what prompt and answer hold already; 1 is none.
        seed: of the answer alone; None draws one.
    Raises:
        ValueError: a value out of its range, by its flag's name.
    """

    max_new_tokens: int = 512
    temperature: float = 0.65
    top_p: float = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        def must(is_right: bool, name: str, wanted: str) -> None:
            if not is_right:
                raise ValueError(f"--{name} must be {wanted}; got {getattr(self, name)}")

        must(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        must(0 <= self.temperature < math.inf, "temperature", "at least 0 (0 is greedy)")
        must(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        must(0 <= self.top_k <= MAX_TOP_K, "top_k", f"0 (all tokens) to {MAX_TOP_K}")
        must(0.1 <= self.repetition_penalty <= 10, "repetition_penalty", "0.1 to 10 (1 is none)")
        must(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", f"from 0 to {MAX_SEED}")

    def processors(self) -> LogitsProcessorList:
        """What is done to the logits of one row, in transformers' order."""
        steps = LogitsProcessorList()
        if self.repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature > 0:
            steps.append(_peak_at_zero)
            steps.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k > 0:
                steps.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                steps.append(TopPLogitsWarper(float(self.top_p)))
        return steps


def _peak_at_zero(_ids: Tensor, logits: Tensor) -> Tensor:
    """The same distribution; no temperature, however small, can overflow it."""
    return logits - logits.max(-1, keepdim=True).values


class Row:
    """One answer being written, with its own random numbers.

    Args:
        prompt_ids: (T,) on the CPU, without padding.
        max_new_tokens: no more than the context has room for.
    """

    def __init__(self, prompt_ids: Tensor, sampling: Sampling, *, max_new_tokens: int):
        self.num_prompt_tokens = len(prompt_ids)
        self.new_ids: list[int] = []
        self.finish_reason: str | None = None  # "stop", "length" or "cancelled"
        self._max_new_tokens = max_new_tokens
        self._is_greedy = sampling.temperature == 0
        self._processors = sampling.processors()
        self._ids = F.pad(prompt_ids, (0, max_new_tokens))  # filled as the answer grows
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def take(self, logits: Tensor, *, eos_token_id: int) -> int:  # (V,) float32 on the CPU
        """Choose the next token; it may be the last one."""
        length = self.num_prompt_tokens + len(self.new_ids)
        scores = self._processors(self._ids[None, :length], logits[None])[0]
        if self._is_greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        self._ids[length] = token
        self.new_ids.append(token)
        if token == eos_token_id:
            self.finish_reason = "stop"
        elif len(self.new_ids) == self._max_new_tokens:
            self.finish_reason = "length"
        return token


class Decoder:
    """Writes the answers of a batch, one token of every unfinished row at a time.

    A row's tokens depend on its own prompt and seed alone. Every step may be taken by another
    thread, one at a time; several decoders may share a model.

    Args:
        batch: of `VLMProcessor.prompt_batch`. rows: one for each of its rows.
    """

    def __init__(
        self, model: MiniMindVLM, batch: dict[str, Tensor], rows: list[Row], *, eos_token_id: int
    ):
        self.rows = rows
        self._active = list(rows)
        self._model = model
        self._eos_token_id = eos_token_id
        self._inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        self._mask = self._inputs["attention_mask"]  # (B, T)
        self._cache = None

    @property
    def is_done(self) -> bool:
        return not self._active

    def cancel(self) -> None:
        """End what is unfinished where it stands, and let go of its memory."""
        for row in self._active:
            row.finish_reason = "cancelled"
        self._active, self._inputs, self._cache = [], {}, None

    @torch.inference_mode()
    def step(self) -> None:
        """The next token of every unfinished row; after an error there is none any more."""
        try:
            logits = self._forward()
        except RuntimeError:
            self.cancel()  # its memory is free for others while the error is told
            raise
        for row, scores in zip(self._active, logits, strict=True):
            row.take(scores, eos_token_id=self._eos_token_id)
        going_on = [i for i, row in enumerate(self._active) if row.finish_reason is None]
        if len(going_on) < len(self._active):  # finished rows cost nothing
            self._active = [self._active[i] for i in going_on]
            kept = torch.tensor(going_on, dtype=torch.int64, device=self._mask.device)
            self._mask = self._mask[kept]
            self._cache.batch_select_indices(kept)

    def _forward(self) -> Tensor:
        """Logits (B, V) of the next tokens, in float32 on the CPU."""
        if self._cache is None:
            inputs = self._inputs
        else:
            last = torch.tensor([[row.new_ids[-1]] for row in self._active])
            # As embeddings, so that no written token is taken for an image's placeholder.
            embeds = self._model.model.embed_tokens(last.to(self._mask.device))
            self._mask = F.pad(self._mask, (0, 1), value=1)
            inputs = {
                "inputs_embeds": embeds,
                "attention_mask": self._mask,
                "past_key_values": self._cache,
            }
        output = self._model(**inputs, use_cache=True, logits_to_keep=1)
        self._inputs, self._cache = {}, output.past_key_values
        return output.logits[:, -1].float().cpu()


class TextPieces:
    """Token ids to text as they come, never half a character.

    The bytes of one character may come in several tokens: what may still grow waits. Joined, the
    pieces are the decoded answer without half a character at its end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._waiting: list[int] = []  # ids since the last character boundary
        self._num_said = 0  # characters of theirs that are out already

    def push(self, token: int) -> str:
        """What the token completes; often its text, sometimes nothing."""
        self._waiting.append(token)
        text = self._tokenizer.decode(
            self._waiting, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        whole = text.removesuffix(HALF)
        piece = whole[self._num_said :]
        if whole == text:
            self._waiting, self._num_said = [], 0
        else:
            self._num_said = len(whole)
        return piece
