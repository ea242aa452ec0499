"""Owns `VLMEngine`, by which evaluation, terminal chat, web page and API server all use a model.

They build messages by `ask` and `VLMEngine.remember`, so that the same text, pictures and seed give
the same answer everywhere.
"""

import argparse
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.generation.attention_map import image_attention
from model.generation.beam_search import BeamDecoder, beam_room
from model.generation.context import Context
from model.generation.decoding import AnswerState, Decoder, TextPieces
from model.generation.sampling import Sampling, cannot_think
from model.generation.thinking import Piece, ThinkingSplitter, without_thinking
from model.machine.device import memory_guard
from model.vision.pictures import Picture
from model.vlm_processor import IMAGE_TAG, Message
from model.weights.build_model import LoadedModel, load_model

NO_ROOM_ADVICE = "ask more briefly, with fewer pictures, or lower --batch_size or --concurrency"
# As `VLMProcessor` takes them: pictures, or what is known of them already.
Images = Sequence[Picture | Tensor] | Tensor


@dataclass(frozen=True)
class Answer:
    """An answer and how it ended.

    Args:
        finish_reason: "stop" (the model wrote its end token), "length" or "cancelled".
        num_new_tokens: the end token included.
        num_dropped_turns: old turns that the context had no room for.
        reasoning: the thinking in front of `text`; None where there is none.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_new_tokens: int
    num_dropped_turns: int
    reasoning: str | None = None


def ask(prompt: str, *, num_images: int) -> list[Message]:
    """One user message; a prompt without any `<image>` gets one in front for every image."""
    if IMAGE_TAG not in prompt:
        prompt = f"{IMAGE_TAG}\n" * num_images + prompt
    return [{"role": "user", "content": prompt}]


class Stream:
    """One answer as it comes: iterate over the pieces of its text, then read `answer`.

    Thinking comes first; `is_thinking` says whether the piece that was returned last belongs to it.
    Nothing is computed between two pieces, and each may be read by another thread. Closing the
    stream, leaving it as a context manager or setting `cancel` ends the answer at the next token.
    Beam search gives the answer as a whole, once it is found; if `cancel` is set meanwhile, that
    is the best beam so far.
    """

    def __init__(
        self,
        decoder: Decoder | BeamDecoder,
        pieces: TextPieces,
        splitter: ThinkingSplitter,
        *,
        num_dropped_turns: int,
        cancel: threading.Event | None,
    ):
        self.is_thinking = False
        self._decoder, self._pieces, self._splitter = decoder, pieces, splitter
        self._ready: deque[Piece] = deque()
        self._num_dropped_turns = num_dropped_turns
        self._cancel = cancel

    def __iter__(self) -> Iterator[str]:
        return self

    @memory_guard(NO_ROOM_ADVICE)
    def __next__(self) -> str:
        while not self._ready and not self._decoder.is_done:
            if self._cancel is not None and self._cancel.is_set():
                self.close()
                break
            answer = self._decoder.answers[0]
            num_before = len(answer.new_ids)
            self._decoder.step()
            text = "".join(map(self._pieces.push, answer.new_ids[num_before:]))
            self._ready += self._splitter.push(text)
        if not self._ready:
            self._ready += self._splitter.finish()
        if not self._ready:
            raise StopIteration
        text, self.is_thinking = self._ready.popleft()
        return text

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the answer with the tokens it has; nothing happens to a finished one."""
        self._decoder.cancel()

    @property
    def answer(self) -> Answer:
        """The answer, once it has ended."""
        if not self._decoder.is_done:
            raise ValueError(
                "the answer has not ended yet: read the stream to its end, or close it"
            )
        self._ready += self._splitter.finish()
        return _answer(self._decoder.answers[0], self._splitter, self._num_dropped_turns)


def _answer(state: AnswerState, split: ThinkingSplitter, num_dropped_turns: int) -> Answer:
    assert state.finish_reason is not None
    return Answer(
        split.answer,
        state.finish_reason,
        state.num_prompt_tokens,
        len(state.new_ids),
        num_dropped_turns,
        split.reasoning,
    )


class VLMEngine:
    """A loaded model that answers; safe to share between threads.

    It has no state that answering changes: every answer has its own cache and random numbers.
    """

    def __init__(self, loaded: LoadedModel):
        self.model, self.processor = loaded.model, loaded.processor
        self.path, self.can_see = loaded.path, loaded.can_see
        self.context = Context(self.processor, max_tokens=self.model.config.max_position_embeddings)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "VLMEngine":
        """Load the model that the flags name, strictly; raises as `load_model` does."""
        return cls(load_model(args))

    @property
    def generation(self) -> int:
        """Of the model; a key of `GENERATIONS`."""
        return self.model.config.generation

    @property
    def can_think(self) -> bool:
        """Whether its answers may stand behind a think block."""
        return self.processor.can_think

    @property
    def warning(self) -> str | None:
        """What the user should know before using this model; None if nothing."""
        if self.can_see:
            return None
        return (
            f"{self.path.name} has no projection, so this model cannot see: what it says about "
            "images is made up; train it by trainer/train_pretrain_vlm.py"
        )

    @property
    def max_tokens(self) -> int:
        """Length of the context: prompt and answer together."""
        return self.context.max_tokens

    @memory_guard(NO_ROOM_ADVICE)
    def generate(
        self,
        conversations: list[tuple[list[Message], Images]],
        sampling: Sampling,
        *,
        cancel: threading.Event | None = None,
    ) -> list[Answer]:
        """Answers to a batch of (messages, images).

        Every answer has its own random numbers from `sampling.seed`, so that the other
        conversations of the batch do not change it.

        Raises:
            ValueError, OSError: a conversation or picture that cannot be used.
            OutOfMemory: (a ValueError too) memory ran out; what was allocated is free again.
        """
        decoder, dropped = self._start(conversations, sampling, cancel)
        while not decoder.is_done:
            if cancel is not None and cancel.is_set():
                decoder.cancel()
            else:
                decoder.step()
        answers = []
        for state, num_dropped_turns in zip(decoder.answers, dropped, strict=True):
            pieces, splitter = TextPieces(self.processor.tokenizer), self._splitter(sampling)
            splitter.push("".join(pieces.push(token) for token in state.new_ids))
            splitter.finish()
            answers.append(_answer(state, splitter, num_dropped_turns))
        return answers

    def _splitter(self, sampling: Sampling) -> ThinkingSplitter:
        return ThinkingSplitter(can_think=self.can_think, is_open=sampling.open_thinking)

    @memory_guard(NO_ROOM_ADVICE)
    def stream(
        self,
        messages: list[Message],
        images: Images,
        sampling: Sampling,
        *,
        cancel: threading.Event | None = None,
    ) -> Stream:
        """One answer in pieces.

        Raises:
            ValueError, OSError: as `generate`, before the first piece.
            OutOfMemory: here or while any piece is read.
        """
        decoder, (num_dropped_turns,) = self._start([(messages, images)], sampling, cancel)
        return Stream(
            decoder,
            TextPieces(self.processor.tokenizer),
            self._splitter(sampling),
            num_dropped_turns=num_dropped_turns,
            cancel=cancel,
        )

    def _start(
        self,
        conversations: list[tuple[list[Message], Images]],
        sampling: Sampling,
        cancel: threading.Event | None,
    ) -> tuple[Decoder | BeamDecoder, list[int]]:
        """A decoder, and how many turns were dropped from each conversation."""
        if not conversations:
            raise ValueError("no conversation to answer")
        thinks = sampling.open_thinking
        if thinks and not self.can_think:
            raise ValueError(f"open_thinking: {cannot_think(self.generation)}")
        prompts, dropped = [], []
        for messages, images in conversations:
            kept, num_dropped = self.context.fit(
                messages, max_new_tokens=sampling.max_new_tokens, open_thinking=thinks
            )
            prompts.append((kept, images))
            dropped.append(num_dropped)
        batch = self.processor.prompt_batch(prompts, open_thinking=thinks)
        answers = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            prompt_ids = ids[mask.bool()]
            room = beam_room(len(prompt_ids), sampling.num_beams, max_tokens=self.max_tokens)
            limit = min(sampling.max_new_tokens, room)
            answers.append(AnswerState(prompt_ids, sampling, max_new_tokens=limit))
        what, end = (self.model, batch, answers), self.processor.tokenizer.eos_token_id
        if sampling.num_beams == 1:
            return Decoder(*what, eos_token_id=end), dropped
        return BeamDecoder(*what, sampling, eos_token_id=end, cancel=cancel), dropped

    def remember(self, messages: list[Message], answer: str) -> list[Message]:
        """The conversation with the model's answer appended, for the next question.

        Where an answer spells `<image>` or a special token, it is made ordinary text. Thinking
        does not stay in the conversation.
        """
        if self.can_think:
            answer = without_thinking(answer)
        return [*messages, {"role": "assistant", "content": self.processor.plain(answer)}]

    @memory_guard(NO_ROOM_ADVICE)
    @torch.inference_mode()
    def look(
        self,
        messages: list[Message],
        images: Images,
        answer_text: str,
        *,
        layer: int | None = None,
    ) -> list[Tensor]:
        """Attention maps: how much an answer's tokens attend to each patch of each image.

        Args:
            layer: of the language model, from 0; None is the mean over all layers.
        Returns:
            One (side, side) float32 map for each image, on the CPU. The values are shares of all
            attention: the maps together sum to at most 1.
        Raises:
            ValueError: the answer is empty, there is no such layer, or as `generate`.
        """
        num_layers = self.model.config.num_hidden_layers
        if layer is not None and not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} is none of the model's 0 to {num_layers - 1}")
        answer = self.processor.tokenizer(answer_text, add_special_tokens=False)["input_ids"]
        if not answer:
            raise ValueError("the answer is empty: there is nothing to look from")
        messages, _ = self.context.fit(messages, max_new_tokens=len(answer))
        batch = self.processor.prompt_batch([(messages, images)])
        answer_ids = torch.tensor([answer[: self.max_tokens - batch["input_ids"].shape[1]]])
        return image_attention(self.model, batch, answer_ids, layer=layer)
