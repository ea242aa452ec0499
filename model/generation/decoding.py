"""Owns how an answer is written token by token: the loop over the cache, text in pieces.

Shapes: B rows still being written, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.generation.sampling import Sampling
from model.model_vlm import MiniMindVLM

HALF = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


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
