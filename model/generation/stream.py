"""Owns answers as they come: the text of each new token, with thinking apart."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from model.generation.decoding import AnswerState, TextPieces, TokenScore
from model.generation.sampling import Sampling
from model.generation.thinking import ThinkingSplitter
from model.machine.device import memory_guard

NO_ROOM_ADVICE = "ask more briefly, with fewer pictures, or lower --batch_size or --batch"


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


class DecodesAnswers(Protocol):
    """Where tokens come from: `Decoder`, `BeamDecoder`, or `Member` of a batch."""

    answers: list[AnswerState]

    @property
    def is_done(self) -> bool: ...

    @property
    def has_arrived(self) -> bool: ...

    def listen(self, arrival: Callable[[], None]) -> bool: ...

    def step(self) -> None:
        """Go on until there are new tokens, or none follow."""

    def cancel(self) -> None:
        """End the unfinished answers with the tokens they have."""

    def end(self, answer: AnswerState) -> None:
        """End one of the answers so."""


class Written(NamedTuple):
    """Text that has come to one of the answers, and whether it is thinking."""

    choice: int  # which answer, from 0
    text: str
    is_thinking: bool


class Streams:
    """Answers that are computed together, as they come: iterate over what is written.

    Nothing is computed between two pieces, and each may be read by another thread. Closing, leaving
    as a context manager or setting `cancel` ends all answers at the next token. Beam search gives
    an answer as a whole, once it is found; if `cancel` is set meanwhile, that is the best beam so
    far.
    """

    def __init__(
        self,
        decoder: DecodesAnswers,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        can_think: bool,
        num_dropped_turns: list[int],
        cancel: threading.Event | None,
    ):
        self._decoder, self._num_dropped_turns = decoder, num_dropped_turns
        self._cancel = cancel
        skips = sampling.skip_special_tokens
        self._texts = [TextPieces(tokenizer, skip_special_tokens=skips) for _ in decoder.answers]
        is_open = sampling.open_thinking
        self._splitters = [
            ThinkingSplitter(can_think=can_think, is_open=is_open) for _ in decoder.answers
        ]
        self._num_read = [0] * len(decoder.answers)  # tokens whose text has been taken
        self._ready: deque[Written] = deque()
        # Of each answer: the characters that its text has so far, in front of each of its tokens
        # and in all.
        self.offsets: list[list[int]] = [[] for _ in decoder.answers]
        self.num_characters = [0] * len(decoder.answers)

    def __len__(self) -> int:
        return len(self._decoder.answers)

    def __iter__(self) -> Iterator[Written]:
        return self

    def __next__(self) -> Written:
        while not self.has_next:
            self.advance()
        if not self._ready:
            self._finish()
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    @property
    def has_next(self) -> bool:
        """Whether the next piece, or the end, is there without a further token."""
        return bool(self._ready) or self._decoder.is_done

    @memory_guard(NO_ROOM_ADVICE)
    def advance(self) -> None:
        """Take the next token of each answer, whose text may be no whole character yet."""
        if self._cancel is not None and self._cancel.is_set():
            self.close()
            return
        self._decoder.step()
        for index in range(len(self)):
            self._read(index)

    def listen(self, arrival: Callable[[], None]) -> bool:
        """Ask for a call, from another thread, whenever `advance` need not wait (`has_arrived`).

        Returns:
            Whether there will be any: False where the tokens are computed in `advance`.
        """
        return self._decoder.listen(arrival)

    @property
    def has_arrived(self) -> bool:
        return self._decoder.has_arrived

    def _read(self, index: int) -> None:
        """Take the text of an answer's new tokens."""
        ids = self._decoder.answers[index].text_ids
        text = ""
        for token in ids[self._num_read[index] :]:
            self.offsets[index].append(self.num_characters[index])
            piece = self._texts[index].push(token)
            self.num_characters[index] += len(piece)
            text += piece
        self._num_read[index] = len(ids)
        pieces = self._splitters[index].push(text) if text else []
        self._ready += [Written(index, *piece) for piece in pieces]

    def _finish(self) -> None:
        for index, splitter in enumerate(self._splitters):
            self._ready += [Written(index, *piece) for piece in splitter.finish()]

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the answers with the tokens they have; nothing happens to finished ones."""
        self._decoder.cancel()

    def end(self, index: int) -> None:
        """End one answer with the tokens it has, between two pieces."""
        self._decoder.end(self._decoder.answers[index])

    def scores(self, index: int, span: slice) -> list[TokenScore]:
        """Of some of an answer's tokens; aligned with `offsets`."""
        return self._decoder.answers[index].scores[span]

    @property
    def answers(self) -> list[Answer]:
        """The answers, once they have ended."""
        if not self._decoder.is_done:
            raise ValueError(
                "the answer has not ended yet: read the stream to its end, or close it"
            )
        self._finish()
        return [self._answer(index) for index in range(len(self))]

    def _answer(self, index: int) -> Answer:
        state, split = self._decoder.answers[index], self._splitters[index]
        assert state.finish_reason is not None
        return Answer(
            split.answer,
            state.finish_reason,
            state.num_prompt_tokens,
            len(state.new_ids),
            self._num_dropped_turns[index],
            split.reasoning,
        )


class Stream:
    """One answer as it comes: iterate over the pieces of its text, then read `answer`.

    Thinking comes first; `is_thinking` says whether the piece that was returned last belongs to it.
    All else is as of `Streams`.
    """

    def __init__(self, streams: Streams):
        self.is_thinking = False
        self._streams, self._decoder = streams, streams._decoder

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        _, text, self.is_thinking = next(self._streams)
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
        (answer,) = self._streams.answers
        return answer
