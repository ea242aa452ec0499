"""Owns using a model: `VLMEngine`, the one way in which evaluation, chat, page and server answer.

Whoever asks builds the messages by `ask` and `VLMEngine.remember`, so that the same words, pictures
and seed give the same answer everywhere.
"""

import argparse
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from model.generation.attention_map import image_attention
from model.generation.decoding import Decoder, Row, TextPieces
from model.generation.sampling import Sampling
from model.machine.device import memory_guard
from model.vlm_processor import IMAGE_TAG
from model.weights.build_model import LoadedModel, load_model

NO_ROOM_ADVICE = "ask more briefly, with fewer pictures, or lower --batch_size or --concurrency"
RESERVED_SHARE = 4  # of the context, 1 / this: what earlier turns give way to at most


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Args:
        finish_reason: "stop" (it ended by itself), "length" or "cancelled".
        num_new_tokens: the end token included.
        num_dropped_turns: how many old turns the context had no room for.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_new_tokens: int
    num_dropped_turns: int


def ask(prompt: str, *, num_images: int) -> list[dict]:
    """One user message; a prompt without any `<image>` gets one in front for every image."""
    if IMAGE_TAG not in prompt:
        prompt = f"{IMAGE_TAG}\n" * num_images + prompt
    return [{"role": "user", "content": prompt}]


class Stream:
    """One answer as it comes: iterate over the pieces of its text, then read `answer`.

    Nothing runs between two pieces, and each may be taken by another thread. Closing it, leaving
    it as a context manager or setting `cancel` ends the answer at the next token.
    """

    def __init__(
        self,
        decoder: Decoder,
        pieces: TextPieces,
        *,
        num_dropped_turns: int,
        cancel: threading.Event | None,
    ):
        self._decoder, self._pieces = decoder, pieces
        self._num_dropped_turns = num_dropped_turns
        self._cancel = cancel
        self._text = ""

    def __iter__(self) -> Iterator[str]:
        return self

    @memory_guard(NO_ROOM_ADVICE)
    def __next__(self) -> str:
        while not self._decoder.is_done:
            if self._cancel is not None and self._cancel.is_set():
                self.close()
                break
            self._decoder.step()
            piece = self._pieces.push(self._decoder.rows[0].new_ids[-1])
            if piece:
                self._text += piece
                return piece
        raise StopIteration

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the answer where it stands; a finished one stays as it is."""
        self._decoder.cancel()

    @property
    def answer(self) -> Answer:
        """The answer, once it has ended."""
        if not self._decoder.is_done:
            raise ValueError(
                "the answer has not ended yet: read the stream to its end, or close it"
            )
        return _answer(self._decoder.rows[0], self._text, self._num_dropped_turns)


def _answer(row: Row, text: str, num_dropped_turns: int) -> Answer:
    return Answer(
        text, row.finish_reason, row.num_prompt_tokens, len(row.new_ids), num_dropped_turns
    )


class VLMEngine:
    """A loaded model that answers; safe to share between threads.

    Nothing here changes after it is made: every answer has its own cache and random numbers.
    """

    def __init__(self, loaded: LoadedModel):
        self.model, self.processor = loaded.model, loaded.processor
        self.path, self.can_see = loaded.path, loaded.can_see
        # The vocabulary is spelled a character for each byte: so many bytes has a token at most.
        self._max_token_bytes = max(map(len, self.processor.tokenizer.get_vocab()))

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "VLMEngine":
        """Load what `add_model_arguments` describes, strictly; raises as `load_model` does."""
        return cls(load_model(args))

    @property
    def warning(self) -> str | None:
        """What to tell whoever starts this model; None where there is nothing to tell."""
        if self.can_see:
            return None
        return (
            f"{self.path.name} has no projection, so this model cannot see: what it says about "
            "images is made up; train it by trainer/train_pretrain_vlm.py"
        )

    @property
    def max_tokens(self) -> int:
        """Length of the context: prompt and answer together."""
        return self.model.config.max_position_embeddings

    @property
    def max_characters(self) -> int:
        """No longer text has room in the context, whatever it says: it need not be tokenized."""
        return self.max_tokens * self._max_token_bytes

    @memory_guard(NO_ROOM_ADVICE)
    def generate(
        self,
        conversations: list[tuple[list[dict], list]],
        sampling: Sampling,
        *,
        cancel: threading.Event | None = None,
    ) -> list[Answer]:
        """Answers to a batch of (messages, images).

        Every row has its own random numbers from `sampling.seed`: what stands beside it in the
        batch does not change it.

        Raises:
            ValueError, OSError: a conversation or picture that cannot be used.
            OutOfMemory: there is no room for it, a ValueError too; what it took is free again.
        """
        decoder, dropped = self._start(conversations, sampling)
        while not decoder.is_done:
            if cancel is not None and cancel.is_set():
                decoder.cancel()
            else:
                decoder.step()
        answers = []
        for row, num_dropped_turns in zip(decoder.rows, dropped, strict=True):
            pieces = TextPieces(self.processor.tokenizer)
            text = "".join(pieces.push(token) for token in row.new_ids)
            answers.append(_answer(row, text, num_dropped_turns))
        return answers

    @memory_guard(NO_ROOM_ADVICE)
    def stream(
        self,
        messages: list[dict],
        images: list | Tensor,
        sampling: Sampling,
        *,
        cancel: threading.Event | None = None,
    ) -> Stream:
        """One answer in pieces; raises as `generate` does, before the first piece, but for
        `OutOfMemory`, which may come with any.

        Args:
            images: also as their `pixel_values` (I, 3, S, S).
        """
        decoder, (num_dropped_turns,) = self._start([(messages, images)], sampling)
        return Stream(
            decoder,
            TextPieces(self.processor.tokenizer),
            num_dropped_turns=num_dropped_turns,
            cancel=cancel,
        )

    def _start(
        self, conversations: list[tuple[list[dict], list]], sampling: Sampling
    ) -> tuple[Decoder, list[int]]:
        """A decoder, and how many turns were dropped from each conversation."""
        if not conversations:
            raise ValueError("no conversation to answer")
        fitted = [self.fit(messages, images, sampling) for messages, images in conversations]
        batch = self.processor.prompt_batch([(m, images) for m, images, _ in fitted])
        rows = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            prompt_ids = ids[mask.bool()]
            room = self.max_tokens - len(prompt_ids)
            rows.append(
                Row(prompt_ids, sampling, max_new_tokens=min(sampling.max_new_tokens, room))
            )
        eos_token_id = self.processor.tokenizer.eos_token_id
        decoder = Decoder(self.model, batch, rows, eos_token_id=eos_token_id)
        return decoder, [num_dropped for *_, num_dropped in fitted]

    def fit(
        self, messages: list[dict], images: Sequence | Tensor, sampling: Sampling
    ) -> tuple[list[dict], Sequence | Tensor, int]:
        """Drop the oldest turns, a question with its answer, until prompt and answer fit.

        For an answer of up to a quarter of the context turns are dropped; a longer one takes what
        room there is, so that asking for the longest does not erase the conversation. A turn that
        shows an image stays, and so do the system message and the last question. Where even that
        leaves less room, the answer is the shorter. The pictures
        are not looked at.

        Returns:
            messages, images, and the number of dropped turns.
        Raises:
            ValueError: there is no room for an answer at all.
        """
        turns = _turns(messages)
        droppable = [i for i, turn in enumerate(turns[:-1]) if _is_droppable(turn)]
        reserved = min(sampling.max_new_tokens, max(1, self.max_tokens // RESERVED_SHARE))
        fewest = self._fewest_to_drop(turns, droppable)

        def without(num_dropped: int) -> list[dict]:
            gone = set(droppable[:num_dropped])
            return [m for i, turn in enumerate(turns) if i not in gone for m in turn]

        @cache
        def num_tokens(num_dropped: int) -> int:
            return self._num_tokens(without(num_dropped))

        def fits(num_dropped: int) -> bool:
            return num_tokens(num_dropped) + reserved <= self.max_tokens

        # Tokenizing all again for every guess of a bisection costs; the sizes guess right.
        room = self.max_tokens - reserved - num_tokens(len(droppable))
        sizes = self._turn_sizes([turns[i] for i in droppable[fewest:]])
        num_kept = bisect_right(list(accumulate(reversed(sizes))), room)
        first = len(droppable) - num_kept
        is_enough = first == len(droppable) or fits(first)
        if not is_enough or (first > fewest and fits(first - 1)):
            first = fewest + bisect_left(range(fewest, len(droppable)), True, key=fits)
        if num_tokens(first) >= self.max_tokens:
            what = " without its earlier text turns" if droppable else ""
            raise ValueError(
                f"the prompt has {num_tokens(first)} tokens{what}, the model takes "
                f"{self.max_tokens} with the answer; shorten the question or use fewer images"
            )
        return without(first), images, first

    def check_length(self, messages: list[dict]) -> None:
        """Refuse what is too long to be worth tokenizing, whatever turns are dropped.

        Raises:
            ValueError: what must stay is longer than any text that the context holds.
        """
        turns = _turns(messages)
        self._fewest_to_drop(turns, [i for i, t in enumerate(turns[:-1]) if _is_droppable(t)])

    def _fewest_to_drop(self, turns: list[list[dict]], droppable: list[int]) -> int:
        """How many of the droppable turns must go by the count of characters alone."""
        sizes = [sum(len(message["content"]) for message in turn) for turn in turns]
        left = sum(sizes)
        for num_dropped in range(len(droppable) + 1):
            if left <= self.max_characters:
                return num_dropped
            if num_dropped < len(droppable):
                left -= sizes[droppable[num_dropped]]
        what = " without its earlier text turns" if droppable else ""
        raise ValueError(
            f"the prompt has {left:,} characters{what}, no prompt of over {self.max_characters:,} "
            f"fits: the model takes {self.max_tokens} tokens with the answer; shorten the question"
        )

    def _turn_sizes(self, turns: list[list[dict]]) -> list[int]:
        """Tokens of each turn, as far as it can be said without the rest of the conversation."""
        if not turns:
            return []
        tokenizer = self.processor.tokenizer
        start, end = tokenizer.bos_token, tokenizer.eos_token  # ChatML
        texts = ["".join(f"{start}{m['role']}\n{m['content']}{end}\n" for m in t) for t in turns]
        # Half a character is `render`'s to refuse, where the turn stays; the tokenizer would fail.
        texts = [text.encode(errors="replace").decode() for text in texts]
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _num_tokens(self, messages: list[dict]) -> int:
        text = self.processor.render(messages, add_generation_prompt=True)
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def remember(self, messages: list[dict], said: str) -> list[dict]:
        """The conversation with the model's answer behind it, for the next question.

        A model may say `<image>` or spell a special token: in the history they are only words.
        """
        return [*messages, {"role": "assistant", "content": self.processor.plain(said)}]

    @memory_guard(NO_ROOM_ADVICE)
    @torch.inference_mode()
    def look(
        self,
        messages: list[dict],
        images: list | Tensor,
        answer_text: str,
        *,
        layer: int | None = None,
    ) -> list[Tensor]:
        """Where an answer looks: its tokens' mean attention to the patches of each image.

        Args:
            images: as `VLMProcessor` takes them.
            layer: of the language model, from 0; None is the mean of all.
        Returns:
            One (side, side) float32 map an image, on the CPU: shares of the attention, so that a
            map's sum is at most 1.
        Raises:
            ValueError: no answer, no such layer, or as `generate`.
        """
        num_layers = self.model.config.num_hidden_layers
        if layer is not None and not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} is none of the model's 0 to {num_layers - 1}")
        answer = self.processor.tokenizer(answer_text, add_special_tokens=False)["input_ids"]
        if not answer:
            raise ValueError("the answer is empty: there is nothing to look from")
        room = Sampling(max_new_tokens=len(answer))
        messages, images, _ = self.fit(messages, images, room)
        batch = self.processor.prompt_batch([(messages, images)])
        answer_ids = torch.tensor([answer[: self.max_tokens - batch["input_ids"].shape[1]]])
        return image_attention(self.model, batch, answer_ids, layer=layer)


def _turns(messages: list[dict]) -> list[list[dict]]:
    """A turn begins with each question; what stands before the first one is a turn too."""
    turns: list[list[dict]] = []
    for message in messages:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _is_droppable(turn: list[dict]) -> bool:
    return not any(m["role"] == "system" or IMAGE_TAG in m["content"] for m in turn)
