"""Owns splitting what a model writes into its thinking and its answer, whole or as it comes.

A model that thinks (`Generation.can_think`) writes `<think>\\nthinking\\n</think>\\n\\nanswer`. Its
prompt ends with an empty block, so that the text has normally none, or it opens one, so that the
text begins inside it. A block that does not end has no answer behind it. Later markers are text.
"""

from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
THINKING, ANSWER = "thinking / 思考", "answer / 回答"  # as a terminal names the parts


class Piece(NamedTuple):
    """Some text, and whether it is thinking or answer."""

    text: str
    is_thinking: bool


class ThinkingSplitter:
    """Splits one text that comes in pieces, cut anywhere, also within a marker.

    Line breaks beside the markers belong to neither side, as in the template.

    Args:
        can_think: False leaves every text as it is.
        is_open: the prompt has opened the block.
    """

    def __init__(self, *, can_think: bool, is_open: bool = False):
        assert can_think or not is_open
        self.reasoning: str | None = "" if is_open else None  # None: there is no block
        self.answer = ""
        self._is_open = is_open
        self._read = self._at_start if can_think else self._in_answer
        self._held = ""  # may be part of a marker, or a line break in front of one

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            before = self._read
            if certain := before():
                pieces.append(self._keep(certain, is_thinking=before == self._in_block))
            if self._read == before:
                return pieces

    def finish(self) -> list[Piece]:
        """What was held back, once the text has ended; nothing the next time."""
        held, self._held = self._held, ""
        is_thinking = self._read == self._in_block or (
            self._read == self._at_start and self._is_open
        )
        if is_thinking:
            held = held.strip("\n") if not self.reasoning else held.rstrip("\n")
        if not held or self._read == self._behind_block:
            return []
        return [self._keep(held, is_thinking=is_thinking)]

    def _keep(self, text: str, *, is_thinking: bool) -> Piece:
        if is_thinking:
            self.reasoning = (self.reasoning or "") + text
        else:
            self.answer += text
        return Piece(text, is_thinking)

    def _at_start(self) -> str:
        """Only white space may stand in front of the block."""
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self._held, self.reasoning = text[len(OPEN) :], ""
            self._read = self._in_block
        elif not OPEN.startswith(text):
            self._read = self._in_block if self._is_open else self._in_answer
        return ""

    def _in_block(self) -> str:
        if not self.reasoning:
            self._held = self._held.lstrip("\n")
        text, marker, rest = self._held.partition(CLOSE)
        if marker:
            self._held, self._read = rest, self._behind_block
            return text.rstrip("\n")
        num_marker = next(n for n in range(len(CLOSE), -1, -1) if text.endswith(CLOSE[:n]))
        certain = text[: len(text) - num_marker].rstrip("\n")
        self._held = text[len(certain) :]
        return certain

    def _behind_block(self) -> str:
        self._held = self._held.lstrip("\n")
        if self._held:
            self._read = self._in_answer
        return ""

    def _in_answer(self) -> str:
        text, self._held = self._held, ""
        return text


def without_thinking(text: str) -> str:
    """The answer within any text that may hold thinking: what the history and scores use.

    It is what follows the last `</think>`, as the template has it, whatever opened the block.
    """
    _, marker, answer = text.rpartition(CLOSE)
    if marker:
        return answer.lstrip("\n")
    return "" if text.lstrip().startswith(OPEN) else text


def marked(answer: str, reasoning: str | None) -> str:
    """Both parts for a terminal, under their names; the answer alone where there is no thinking."""
    return answer if reasoning is None else f"[{THINKING}]\n{reasoning}\n[{ANSWER}]\n{answer}"
