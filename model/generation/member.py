"""Owns an answer that is decoded in a batch, between the batch's thread and its reader's."""

import queue
import threading
from collections.abc import Callable, Collection

from torch import Tensor

from model.generation.decoding import AnswerState, TokenScore
from model.generation.prefixes import contents_of
from model.generation.sampler import Sampler


class Member:
    """One request's answer in a batch: a `Decoder` of one answer, for the thread that reads it.

    Args:
        join: tells the batch's thread of it, at the first step.
        inputs: of `VLMProcessor.prompt_batch` or `text_batch`, one prompt.
        sampler: of this answer.
        num_image_tokens: of each image in the prompt.
        num_logprobs: as of `Sampling`.
        cancel: once it is set, the answer ends with the tokens it has.
    """

    def __init__(
        self,
        join: Callable[["Member"], None],
        inputs: dict[str, Tensor],
        answer: AnswerState,
        sampler: Sampler,
        *,
        num_image_tokens: int,
        end_ids: Collection[int],
        num_logprobs: int | None = None,
        cancel: threading.Event | None = None,
    ):
        self.answers = [answer]
        self._join_batch, self._cancel = join, cancel or threading.Event()
        self._end_ids = frozenset(end_ids)
        self._has_joined = self._is_over = False
        # From the batch's thread: a token, why there is none, or None where it was cancelled.
        self._arrived: queue.SimpleQueue[tuple[int, TokenScore | None] | Exception | None] = (
            queue.SimpleQueue()
        )
        self._arrival: Callable[[], None] = lambda: None
        # The rest is the batch's; it knows the answer before its reader does.
        self.inputs, self.sampler, self.num_logprobs = inputs, sampler, num_logprobs
        self.ahead = AnswerState(answer.num_prompt_tokens, max_new_tokens=answer.max_new_tokens)
        self.joined_s = 0.0
        self.contents = contents_of(inputs, num_image_tokens=num_image_tokens)
        self.begins_alone = False  # others began with it, and failed

    @property
    def is_done(self) -> bool:
        return self.answers[0].finish_reason is not None

    def cancel(self) -> None:
        """End the answer with the tokens that were read; nothing happens to a finished one."""
        self.end(self.answers[0])

    def end(self, answer: AnswerState) -> None:
        self._is_over = True
        answer.finish_reason = answer.finish_reason or "cancelled"

    def listen(self, arrival: Callable[[], None]) -> bool:
        """From now on `arrival` is called, in another thread, whenever a step need not wait."""
        self._arrival = arrival
        self._join()
        return True

    @property
    def has_arrived(self) -> bool:
        """Whether a step need not wait."""
        return not self._arrived.empty()

    def _join(self) -> None:
        if not self._has_joined:
            self._has_joined = True
            self._join_batch(self)

    def step(self) -> None:
        """Wait for the answer's next token; whatever it failed of is raised."""
        self._join()
        arrived = self._arrived.get()
        if isinstance(arrived, Exception):
            self.cancel()
            raise arrived
        if arrived is None:
            self.cancel()
            return
        token, score = arrived
        if score is not None:
            self.answers[0].scores.append(score)
        self.answers[0].add_token(token, end_ids=self._end_ids)

    @property
    def wants_no_more(self) -> bool:
        return self._is_over or self._cancel.is_set()

    @property
    def has_ended(self) -> bool:
        return self.ahead.finish_reason is not None

    @property
    def was_broken(self) -> bool:
        """Whether it ended otherwise than by a token."""
        return self.ahead.finish_reason == "cancelled"

    @property
    def most_tokens(self) -> int:
        """That it may come to hold, with its prompt."""
        return self.ahead.num_prompt_tokens + self.ahead.max_new_tokens

    def give(self, token: int, score: TokenScore | None) -> None:
        """The next token, from the batch's thread."""
        self.ahead.add_token(token, end_ids=self._end_ids)
        self._arrived.put((token, score))
        self._arrival()

    def tell(self, failure: Exception | None) -> None:
        """No token follows, from the batch's thread."""
        self.ahead.finish_reason = "cancelled"
        self.inputs = {}
        self._arrived.put(failure)
        self._arrival()
