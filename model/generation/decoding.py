"""Owns the decoding loop: answers token by token over a key-value cache, and ids to text.

Shapes: B unfinished answers, T tokens, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from model.generation.sampling import Sampling
from model.model_vlm import MiniMindVLM

REPLACEMENT = "\ufffd"  # what the tokenizer writes for bytes that are not a whole character


class AnswerState:
    """One answer while it is generated, with its own random numbers.

    Args:
        prompt_ids: (T,) on the CPU, without padding.
        max_new_tokens: must fit in the context behind the prompt.
    """

    def __init__(self, prompt_ids: Tensor, sampling: Sampling, *, max_new_tokens: int):
        self.num_prompt_tokens = len(prompt_ids)
        self.new_ids: list[int] = []
        self.finish_reason: str | None = None  # "stop", "length" or "cancelled"
        self.max_new_tokens = max_new_tokens
        self._is_greedy = sampling.temperature == 0
        self._processors = sampling.processors()
        self._ids = F.pad(prompt_ids, (0, max_new_tokens))  # filled as the answer grows
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def add_token(self, logits: Tensor, *, eos_token_id: int) -> int:
        """Choose the next token and append it; sets `finish_reason` if it is the last one.

        Args:
            logits: (V,) float32 on the CPU.
        """
        length = self.num_prompt_tokens + len(self.new_ids)
        ids = self._ids[None, :length]  # (1, T)
        scores = self._processors(ids, logits[None])[0]  # type: ignore[arg-type]  # int64 will do
        if self._is_greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        self._ids[length] = token
        self.new_ids.append(token)
        if token == eos_token_id:
            self.finish_reason = "stop"
        elif len(self.new_ids) == self.max_new_tokens:
            self.finish_reason = "length"
        return token

    def set_tokens(self, ids: list[int], *, eos_token_id: int) -> None:
        """Take a whole answer, found elsewhere; what stands behind its end or limit is dropped."""
        ids = ids[: self.max_new_tokens]
        has_end = eos_token_id in ids
        self.new_ids = ids[: ids.index(eos_token_id) + 1] if has_end else ids
        self.finish_reason = "stop" if has_end else "length"


class Decoder:
    """Generates the answers of a batch; each step adds one token to every unfinished answer.

    An answer's tokens depend on its own prompt and seed alone. Steps may run in different threads,
    but only one at a time; several decoders may share a model.

    Args:
        batch: of `VLMProcessor.prompt_batch`.
        answers: one for each row of the batch, in its order.
    """

    def __init__(
        self,
        model: MiniMindVLM,
        batch: dict[str, Tensor],
        answers: list[AnswerState],
        *,
        eos_token_id: int,
    ):
        self.answers = answers
        self._active = list(answers)
        self._model = model
        self._eos_token_id = eos_token_id
        self._inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        self._mask = self._inputs["attention_mask"]  # (B, T)
        self._cache: Cache | None = None

    @property
    def is_done(self) -> bool:
        return not self._active

    def cancel(self) -> None:
        """End the unfinished answers with the tokens they have, and free the cache."""
        for answer in self._active:
            answer.finish_reason = "cancelled"
        self._active, self._inputs, self._cache = [], {}, None

    @torch.inference_mode()
    def step(self) -> None:
        """Add a token to every unfinished answer; an error cancels them all."""
        try:
            logits = self._forward()
        except RuntimeError:
            self.cancel()  # frees the cache: others may need it while the error is reported
            raise
        for answer, scores in zip(self._active, logits, strict=True):
            answer.add_token(scores, eos_token_id=self._eos_token_id)
        unfinished = [i for i, a in enumerate(self._active) if a.finish_reason is None]
        if len(unfinished) < len(self._active):  # finished answers leave the batch
            self._active = [self._active[i] for i in unfinished]
            kept = torch.tensor(unfinished, dtype=torch.int64, device=self._mask.device)
            self._mask = self._mask[kept]
            assert self._cache is not None
            self._cache.batch_select_indices(kept)

    def _forward(self) -> Tensor:
        """Logits (B, V) of the next tokens, in float32 on the CPU."""
        if self._cache is None:
            inputs: dict[str, Any] = self._inputs
        else:
            last = torch.tensor([[answer.new_ids[-1]] for answer in self._active])  # (B, 1)
            # As embeddings: a generated token must not be taken for an image placeholder.
            embeds = self._model.model.embed_tokens(last.to(self._mask.device))
            self._mask = F.pad(self._mask, (0, 1), value=1)
            inputs = {
                "inputs_embeds": embeds,
                "attention_mask": self._mask,
                "cache": self._cache,
            }
        output = self._model(**inputs, use_cache=True, logits_to_keep=1)
        self._inputs, self._cache = {}, output.cache
        logits: Tensor = output.logits[:, -1].float().cpu()
        return logits


class TextPieces:
    """Decodes one answer's tokens as they come, in pieces of whole characters.

    A character's bytes may come in several tokens: they are held back until it is complete. The
    pieces joined are the decoded answer, without an incomplete character at its end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._waiting: list[int] = []  # ids since the last character boundary
        self._num_returned = 0  # characters of theirs returned already

    def push(self, token: int) -> str:
        """The characters that this token completes; "" if none."""
        self._waiting.append(token)
        text = self._tokenizer.decode(
            self._waiting, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # of one sequence; a batch would give a list
        whole = text.removesuffix(REPLACEMENT)
        piece = whole[self._num_returned :]
        if whole == text:
            self._waiting, self._num_returned = [], 0
        else:
            self._num_returned = len(whole)
        return piece
