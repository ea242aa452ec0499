"""Owns answering a visitor of the page: one answer at a time for each, kept for a page that is
opened again, its errors told.
"""

import html
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from model.serving.web.conversation import ChatTurn, chat_messages, details, new_turn, prompt_of
from model.serving.web.errors import reason
from model.serving.web.layout import Layout
from model.serving.web.protection.keeping import Kept
from model.serving.web.text import text
from model.serving.web.weights import Weights
from model.serving.web.wish import Wish

log = logging.getLogger(__name__)
SEE_CANCEL_EVERY_S = 0.2
SHOW_EVERY_S = 0.05  # a streamed answer is sent to the browser this often
Updates = dict[Any, Any]  # part of the page -> its new value or properties
Box = dict[str, Any]  # of the question: "text" and "files"


@dataclass(frozen=True)
class Talk:
    """What a page that is opened again gets back."""

    turns: list[ChatTurn]
    weight: str


class Answers:
    """The part of the page that answers, for `Page`.

    Args:
        examples: pictures of the suggested questions.
        length_penalty: of beam search; the page has no slider for it.
        kept: conversations for pages that are opened again.
    """

    parts: Layout

    def __init__(
        self, weights: Weights, *, examples: list[Path], length_penalty: float, kept: Kept[Talk]
    ):
        self.weights, self.examples, self._kept = weights, examples, kept
        self._length_penalty = length_penalty
        self._cancels: dict[str, threading.Event] = {}  # of the sessions being answered
        self._searching = threading.Lock()  # beam searches are no part of a batch: one at a time

    def _stop(self, request: gr.Request) -> None:
        cancel = self._cancels.get(request.session_hash)
        if cancel is not None:
            cancel.set()

    def _ask(
        self, request: gr.Request, box: Box, turns: list[ChatTurn], *choices: Any
    ) -> Iterator[Updates]:
        """Answer the question in the box."""
        wish = Wish.of(request, *choices)
        try:
            generation = self.weights.get(wish.weight).generation
            default = text(f"describe_{generation}", wish.language)
            turn = new_turn(box["text"], box["files"], default_question=default)
        except (ValueError, OSError) as error:
            yield self._warn("refused", wish.language, error=error)
            return
        yield from self._answer([*turns, turn], wish, before=turns, box=box)

    def _ask_suggestion(
        self, request: gr.Request, event: gr.EventData, turns: list[ChatTurn], *choices: Any
    ) -> Iterator[Updates]:
        """Answer the question of the card that was clicked."""
        wish = Wish.of(request, *choices)
        taught = self.weights.taught(wish.weight)
        shown = taught.suggestions(self.examples, wish.language, text)
        cards = [card.elem_id for card in self.parts.cards]
        index = cards.index(event.target.elem_id) if event.target else len(shown)
        if index < len(shown):  # else it is no longer shown
            turn = ChatTurn(shown[index].question, [str(shown[index].picture)])
            yield from self._answer([*turns, turn], wish, before=turns)

    def _regenerate(
        self, request: gr.Request, turns: list[ChatTurn], *choices: Any
    ) -> Iterator[Updates]:
        """Answer the last question once more."""
        if turns:
            fresh = [*turns[:-1], ChatTurn(turns[-1].question, turns[-1].images)]
            yield from self._answer(fresh, Wish.of(request, *choices), before=turns)

    def _answer(
        self, turns: list[ChatTurn], wish: Wish, *, before: list[ChatTurn], box: Box | None = None
    ) -> Iterator[Updates]:
        """Stream the answer to the last turn; if that fails, restore turns (`before`) and box."""
        language = wish.language
        if wish.session in self._cancels:
            yield self._warn("busy", language)
            return
        cancel = self._cancels[wish.session] = threading.Event()
        self._keep(wish.ticket, turns, wish.weight)  # with what is said until a page is left
        try:
            yield self._running(turns, language, clear_box=bool(box))
            yield from self._generate(turns, wish, cancel)
            yield self._done(turns, language)
        except Exception as error:  # any error is shown to the visitor and frees the slot
            if not isinstance(error, ValueError | OSError):
                log.exception("an answer failed")
                shown: Exception | str = text("bug", language)
            else:
                shown = error
            self._warn("failed", language, error=shown)
            self._keep(wish.ticket, before, wish.weight)
            yield self._done(before, language, box=box)
        finally:
            del self._cancels[wish.session]

    def _generate(
        self, turns: list[ChatTurn], wish: Wish, cancel: threading.Event
    ) -> Iterator[Updates]:
        """Fill in the last turn's answer, piece by piece."""
        sampling, turn = wish.sampling(), turns[-1]
        engine = self.weights.get(wish.weight)
        sampling = replace(
            sampling,
            open_thinking=wish.open_thinking and engine.can_think,
            length_penalty=self._length_penalty,
        )
        started_s = shown_s = time.perf_counter()
        with (
            self._turn_to_search(cancel) if sampling.num_beams > 1 else nullcontext(),
            engine.stream(*prompt_of(engine, turns), sampling, cancel=cancel) as pieces,
        ):
            for piece in pieces:
                if pieces.is_thinking:
                    turn.reasoning += piece
                else:
                    turn.answer += piece
                if time.perf_counter() - shown_s >= SHOW_EVERY_S:
                    shown_s = time.perf_counter()
                    yield {self.parts.chat: _shown(turns, wish.language)}
        answer, language = pieces.answer, wish.language
        count, reason = answer.num_dropped_turns, answer.finish_reason
        beams = sampling.num_beams
        turn.note = text(
            "status",
            language,
            tokens=answer.num_new_tokens,
            seed=sampling.seed,
            weight=wish.weight,
            beams=text("beams", language, count=beams) if beams > 1 else "",
            seconds=time.perf_counter() - started_s,
            ending="" if reason == "stop" else text(f"ending_{reason}", language),
            dropped=text("dropped", language, count=count) if count else "",
        )

    @contextmanager
    def _turn_to_search(self, cancel: threading.Event) -> Iterator[None]:
        """Wait until no other beam search runs, or this one is cancelled."""
        is_held = False
        while not is_held and not cancel.is_set():
            is_held = self._searching.acquire(timeout=SEE_CANCEL_EVERY_S)
        try:
            yield
        finally:
            if is_held:
                self._searching.release()

    def _keep(self, ticket: str, turns: list[ChatTurn], weight: str) -> None:
        """For a page that is opened again; a page that has not arrived has no ticket."""
        if turns and ticket:
            self._kept.put(ticket, Talk(turns, weight))
        else:
            self._kept.drop(ticket)

    def _running(self, turns: list[ChatTurn], language: str, *, clear_box: bool) -> Updates:
        at = self.parts
        box = {"submit_btn": False, "stop_btn": True} | ({"value": None} if clear_box else {})
        return {
            at.chat: _shown(turns, language),
            at.status: status_line(text("answering", language)),
            at.box: gr.update(**box),
        }

    def _done(self, turns: list[ChatTurn], language: str, *, box: Box | None = None) -> Updates:
        """The page between answers; `box` is put back into the box."""
        at = self.parts
        buttons = {"submit_btn": True, "stop_btn": False} | ({"value": box} if box else {})
        return {
            at.turns: turns,
            at.chat: _shown(turns, language),
            at.status: details(turns[-1].note, title=text("details", language)) if turns else "",
            at.box: gr.update(**buttons),
            at.share: gr.update(interactive=bool(turns)),
        }

    def _warn(self, key: str, language: str, **values: Any) -> Updates:
        """Show a message, escaped since Gradio renders it as HTML; the page stays as it is."""
        values = {k: reason(v, language) if k == "error" else v for k, v in values.items()}
        gr.Warning(html.escape(text(key, language, **values)))
        return {self.parts.status: gr.skip()}


def _shown(turns: list[ChatTurn], language: str) -> list[dict[str, Any]]:
    """The turns as the page's chat has them."""
    return chat_messages(turns, thinking=text("thinking", language))


def status_line(words: str) -> str:
    """A status as HTML."""
    return f"<span>{html.escape(words)}</span>"
