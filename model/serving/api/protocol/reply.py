"""Owns the replies of `/v1/chat/completions` and `/v1/completions`: whole or in chunks.

Thinking is `reasoning_content`, beside `content`, as vLLM and others have it.
Source: https://platform.openai.com/docs/api-reference/chat/object and completions/object
"""

import asyncio
import contextlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator
from functools import cached_property
from typing import Any

from anyio import to_thread

from model.generation.decoding import TokenScore
from model.generation.engine import VLMEngine
from model.generation.stream import Answer, Streams, Written
from model.serving.api.protocol.logprobs import Spelling, chat_logprobs, text_logprobs
from model.serving.api.protocol.request import Request
from model.serving.api.protocol.stop_text import StopText

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


async def arriving(streams: Streams) -> AsyncIterator[Written]:
    """What comes, while other requests are served: no thread of its own waits for an answer that is
    computed in a batch."""
    loop, has_come = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads
            loop.call_soon_threadsafe(has_come.set)

    is_told = streams.listen(tell)
    while True:
        while is_told and not streams.has_next:
            has_come.clear()
            if streams.has_arrived:
                streams.advance()
            else:
                await has_come.wait()
        if is_told:
            written = next(streams, None)
        else:
            written = await to_thread.run_sync(next, streams, None)
        if written is None:
            return
        yield written


class Reply(ABC):
    """One request while it is answered, and the protocol's objects for it."""

    prefix: str  # of its id
    kind: str  # of the object; `chunk_kind` of its chunks
    chunk_kind: str

    def __init__(self, request: Request, streams: Streams, engine: VLMEngine, *, model_id: str):
        self.request, self.streams, self.model_id = request, streams, model_id
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self._spelling = Spelling(engine.processor.tokenizer)
        self._stops = [StopText(request.stops) for _ in range(len(streams))]
        self._texts = [""] * len(streams)  # without thinking
        self._num_told = [0] * len(streams)  # tokens whose log probabilities are told

    async def written(self) -> AsyncIterator[Written]:
        """Text as it comes, up to a stop string; the tokens are computed in another thread.

        Only the answer is searched for stop strings: in the thinking they would leave none.
        """
        async for written in arriving(self.streams):
            if written.is_thinking:
                yield written
                continue
            stop = self._stops[written.choice]
            if stop.is_found:
                continue
            if text := stop.push(written.text):
                yield self._keep(written.choice, text)
            if stop.is_found:
                self.streams.end(written.choice)
        for choice, stop in enumerate(self._stops):
            if text := stop.rest():
                yield self._keep(choice, text)

    def _keep(self, choice: int, text: str) -> Written:
        self._texts[choice] += text
        return Written(choice, text, is_thinking=False)

    def whole(self) -> dict[str, Any]:
        """The answers as one object, once all is read."""
        choices = [self._choice(i, answer) for i, answer in enumerate(self.answers)]
        return self._object(self.kind, choices) | {"usage": self.usage}

    def first_chunks(self) -> Iterator[bytes]:
        """What is sent before any text."""
        return iter(())

    @abstractmethod
    def chunk(self, written: Written) -> bytes:
        """What is sent of a piece of text."""

    @abstractmethod
    def last_chunks(self) -> Iterator[bytes]:
        """What is sent behind all text."""

    @abstractmethod
    def _choice(self, choice: int, answer: Answer) -> dict[str, Any]:
        """An answer in the object of the whole."""

    @abstractmethod
    def _logprobs(self, scores: list[TokenScore], offsets: list[int]) -> dict[str, Any]:
        """Log probabilities, in the protocol's form."""

    def told_logprobs(self, choice: int, *, is_last: bool = False) -> dict[str, Any] | None:
        """Of the tokens that were not told yet and whose text is: None where none are asked for.

        Args:
            is_last: nothing follows; without a stop string all tokens are told then.
        """
        if self.request.sampling.num_logprobs is None:
            return None
        stop, offsets = self._stops[choice], self.streams.offsets[choice]
        first, end = self._num_told[choice], len(offsets)
        if stop.is_found or not is_last:
            text_end = self.streams.num_characters[choice] - stop.num_withheld
            end = max(first, bisect_left(offsets, text_end))
        self._num_told[choice] = end
        span = slice(first, end)
        return self._logprobs(self.streams.scores(choice, span), offsets[span])

    @cached_property
    def answers(self) -> list[Answer]:
        return self.streams.answers

    def finish_reason(self, choice: int) -> str:
        """`stop` also where a stop string is completed by the last token allowed."""
        is_too_long = self.answers[choice].finish_reason == "length"
        return "length" if is_too_long and not self._stops[choice].is_found else "stop"

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of all answers; a prompt counts once however many answers it has."""
        prompt = sum(a.num_prompt_tokens for a in self.answers[:: self.request.num_choices])
        new = sum(answer.num_new_tokens for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def chunk_of(self, choices: list[dict[str, Any]]) -> bytes:
        empty = {"usage": None} if self.request.with_usage else {}
        return event(self._object(self.chunk_kind, choices) | empty)

    def usage_chunk(self) -> bytes:
        return event(self._object(self.chunk_kind, []) | {"usage": self.usage})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model_id}
        return head | {"choices": choices, "system_fingerprint": None}


class ChatReply(Reply):
    """Of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _logprobs(self, scores: list[TokenScore], offsets: list[int]) -> dict[str, Any]:
        return chat_logprobs(scores, self._spelling)

    def _choice(self, choice: int, answer: Answer) -> dict[str, Any]:
        text = self._texts[choice]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        return {
            "index": choice,
            "message": message,
            "logprobs": self.told_logprobs(choice, is_last=True),
            "finish_reason": self.finish_reason(choice),
        }

    def first_chunks(self) -> Iterator[bytes]:
        for choice in range(len(self.streams)):
            yield self._delta(choice, {"role": "assistant", "content": ""})

    def chunk(self, written: Written) -> bytes:
        field = "reasoning_content" if written.is_thinking else "content"
        logprobs = self.told_logprobs(written.choice)
        return self._delta(written.choice, {field: written.text}, logprobs=logprobs)

    def last_chunks(self) -> Iterator[bytes]:
        for choice in range(len(self.streams)):
            logprobs = self.told_logprobs(choice, is_last=True)
            if logprobs is not None and not logprobs["content"]:
                logprobs = None
            reason = self.finish_reason(choice)
            yield self._delta(choice, {}, logprobs=logprobs, finish_reason=reason)

    def _delta(
        self,
        choice: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        told = {"logprobs": logprobs, "finish_reason": finish_reason}
        return self.chunk_of([{"index": choice, "delta": delta} | told])


class TextReply(Reply):
    """Of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _logprobs(self, scores: list[TokenScore], offsets: list[int]) -> dict[str, Any]:
        return text_logprobs(scores, offsets, self._spelling)

    def _choice(self, choice: int, answer: Answer) -> dict[str, Any]:
        return self._text(choice, self._texts[choice], is_last=True)

    def chunk(self, written: Written) -> bytes:
        return self.chunk_of([self._text(written.choice, written.text)])

    def last_chunks(self) -> Iterator[bytes]:
        for choice in range(len(self.streams)):
            yield self.chunk_of([self._text(choice, "", is_last=True)])

    def _text(self, choice: int, text: str, *, is_last: bool = False) -> dict[str, Any]:
        return {
            "text": text,
            "index": choice,
            "logprobs": self.told_logprobs(choice, is_last=is_last),
            "finish_reason": self.finish_reason(choice) if is_last else None,
        }
