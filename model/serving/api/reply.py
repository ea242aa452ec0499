"""Owns the replies of `/v1/chat/completions`: whole or in chunks, ended at stop strings.

Thinking is `reasoning_content`, beside `content`, as vLLM and others have it.
Source: https://platform.openai.com/docs/api-reference/chat/object
"""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from anyio import to_thread

from model.generation.engine import Answer, Stream
from model.generation.thinking import Piece
from model.serving.api.request import ChatRequest

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


class StopText:
    """Ends a text that comes in pieces in front of the first stop string that is complete.

    Of two that end at the same character the longer one counts. Runs in time linear in the text,
    by the automaton of Knuth, Morris and Pratt.
    Source: D. Knuth, J. Morris, V. Pratt, "Fast pattern matching in strings" (1977).
    """

    def __init__(self, stops: list[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        # Of each stop string: the length of its longest prefix that the text ends with.
        self._num_matched = [0] * len(stops)
        self._held = ""  # may be the start of a stop string
        self.is_found = False

    def push(self, piece: str) -> str:
        """Text that cannot belong to a stop string."""
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
        """The text held back, once the answer has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _borders(word: str) -> list[int]:
    """For each prefix of the word, by length: its longest proper prefix that is also its suffix."""
    borders = [0, 0]
    for character in word[1:]:
        n = borders[-1]
        while n and word[n] != character:
            n = borders[n]
        borders.append(n + (word[n] == character))
    return borders


@dataclass
class Completion:
    """One request while it is answered, and the protocol's objects for it."""

    request: ChatRequest
    model_id: str
    stream: Stream
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    _is_cut: bool = field(default=False, init=False)  # by a stop string

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it comes, up to a stop string; the tokens are computed in a thread.

        Only the answer is searched for stop strings: in the thinking they would leave none.
        """
        stop = StopText(self.request.stops)
        while (piece := await to_thread.run_sync(next, self.stream, None)) is not None:
            if self.stream.is_thinking:
                yield Piece(piece, is_thinking=True)
                continue
            if text := stop.push(piece):
                yield Piece(text, is_thinking=False)
            if stop.is_found:
                self._is_cut = True
                self.stream.close()
                return
        if text := stop.rest():
            yield Piece(text, is_thinking=False)

    @property
    def answer(self) -> Answer:
        return self.stream.answer

    @property
    def finish_reason(self) -> str:
        """`stop` also where a stop string is completed by the last token allowed."""
        is_too_long = self.answer.finish_reason == "length" and not self._is_cut
        return "length" if is_too_long else "stop"

    @property
    def usage(self) -> dict[str, int]:
        prompt, new = self.answer.num_prompt_tokens, self.answer.num_new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def whole(self, text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.answer.reasoning is not None:
            message["reasoning_content"] = self.answer.reasoning
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self.finish_reason,
        }
        return self._object("chat.completion", [choice]) | {"usage": self.usage}

    def chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        empty = {"usage": None} if self.request.with_usage else {}
        return event(self._object("chat.completion.chunk", [choice]) | empty)

    def usage_chunk(self) -> bytes:
        return event(self._object("chat.completion.chunk", []) | {"usage": self.usage})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model_id}
        return head | {"choices": choices, "system_fingerprint": None}
