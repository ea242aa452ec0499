"""Owns what a reply of `/v1/chat/completions` is made of: whole, in chunks, cut at stop strings.

Source: https://platform.openai.com/docs/api-reference/chat/object
"""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from anyio import to_thread

from model.generation.engine import Answer, Stream
from model.serving.api.request import ChatRequest

DONE = b"data: [DONE]\n\n"


def event(data: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


class StopText:
    """Cuts a text that comes in pieces before the stop string that is complete first.

    Of two that end at the same character the longer one counts. The work grows with the text
    alone. Source: D. Knuth, J. Morris, V. Pratt, "Fast pattern matching in strings" (1977).
    """

    def __init__(self, stops: list[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._num_matched = [0] * len(stops)  # characters of each that the text ends with
        self._held = ""  # may be the beginning of a stop string
        self.is_found = False

    def push(self, piece: str) -> str:
        """What is certain to stand before any stop string."""
        text = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            complete = 0
            for i, (stop, borders) in enumerate(self._stops):
                n = self._num_matched[i]
                while n and stop[n] != character:
                    n = borders[n]
                n += stop[n] == character
                self._num_matched[i] = n
                complete = max(complete, n if n == len(stop) else 0)
            if complete:
                self.is_found, self._held = True, ""
                return text[: end - complete]
        num_certain = len(text) - max(self._num_matched, default=0)
        self._held = text[num_certain:]
        return text[:num_certain]

    def rest(self) -> str:
        """What was held when the text ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _borders(word: str) -> list[int]:
    """For each length n of a beginning of the word, its longest proper beginning that ends it."""
    borders = [0, 0]
    for character in word[1:]:
        n = borders[-1]
        while n and word[n] != character:
            n = borders[n]
        borders.append(n + (word[n] == character))
    return borders


@dataclass
class Completion:
    """One request being answered, and the objects of the protocol that tell of it."""

    request: ChatRequest
    model_id: str
    stream: Stream
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    _is_cut: bool = field(default=False, init=False)  # at a stop string

    async def pieces(self) -> AsyncIterator[str]:
        """Text as it comes, up to a stop string; the tokens are computed in a thread."""
        stop = StopText(self.request.stops)
        while (piece := await to_thread.run_sync(next, self.stream, None)) is not None:
            if text := stop.push(piece):
                yield text
            if stop.is_found:
                self._is_cut = True
                self.stream.close()
                return
        if text := stop.rest():
            yield text

    @property
    def answer(self) -> Answer:
        return self.stream.answer

    @property
    def finish_reason(self) -> str:
        """A stop string is the reason also where it ends with the last token allowed."""
        is_too_long = self.answer.finish_reason == "length" and not self._is_cut
        return "length" if is_too_long else "stop"

    @property
    def usage(self) -> dict:
        prompt, new = self.answer.num_prompt_tokens, self.answer.num_new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def whole(self, text: str) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None,
                  "finish_reason": self.finish_reason}  # fmt: skip
        return self._object("chat.completion", [choice]) | {"usage": self.usage}

    def chunk(self, delta: dict, *, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        empty = {"usage": None} if self.request.with_usage else {}
        return event(self._object("chat.completion.chunk", [choice]) | empty)

    def usage_chunk(self) -> bytes:
        return event(self._object("chat.completion.chunk", []) | {"usage": self.usage})

    def _object(self, kind: str, choices: list) -> dict:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model_id}
        return head | {"choices": choices, "system_fingerprint": None}
