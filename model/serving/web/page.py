"""Owns the web page's event handlers.

A visitor's conversation and weight are state of the visitor's session; the loaded models are
shared. Answers wait in one queue.
"""

import html
import logging
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from model.generation.engine import VLMEngine
from model.generation.sampling import MAX_SEED, Sampling
from model.serving.web import conversation as web_chat
from model.serving.web.attention_picture import draw_look
from model.serving.web.conversation import ChatTurn, chat_messages, new_turn, prompt_of
from model.serving.web.layout import LIMITS, Layout
from model.serving.web.protection.privacy import without_paths
from model.serving.web.text import LANGUAGES, page_language, text
from model.serving.web.weights import Weights

log = logging.getLogger(__name__)
NUM_DRAWN_SEEDS = 2**31 - 1  # short enough to be copied by hand
SHOW_EVERY_S = 0.05  # a streamed answer is sent to the browser this often
Updates = dict[Any, Any]  # part of the page -> its new value or properties
Box = dict[str, Any]  # of the question: "text" and "files"
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
DOWNLOAD = """(page) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([page], {type: "text/html"}));
    link.download = "conversation.html";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}"""
AT_ONCE: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", **PRIVATE}


@dataclass(frozen=True)
class Wish:
    """Options of an answer; `settings` are the seed's text (empty: a new one) and the sliders.

    `open_thinking` asks a model that can to think first.
    """

    session: str
    weight: str
    language: str
    settings: tuple[Any, ...]
    open_thinking: bool = False

    @classmethod
    def of(cls, request: gr.Request, weight: str, language: str, *values: Any) -> "Wish":
        """From the values of the page's parts."""
        *settings, thinks = values
        return cls(request.session_hash, weight, LANGUAGES[language], tuple(settings), bool(thinks))

    def sampling(self) -> Sampling:
        """Raises `ValueError` for a value out of its range."""
        wanted, *values = self.settings
        wanted = wanted.strip()
        if wanted and not (wanted.isdecimal() and int(wanted) <= MAX_SEED):
            raise ValueError(f"the seed {wanted[:20]!r} is no whole number from 0 to {MAX_SEED}")
        seed = int(wanted) if wanted else random.randrange(NUM_DRAWN_SEEDS)
        whole = (step == 1 for _, _, step in LIMITS.values())
        values = [int(v) if is_whole else v for v, is_whole in zip(values, whole, strict=True)]
        chosen = dict(zip(LIMITS, values, strict=True))
        if chosen["num_beams"] > 1:  # as the slider's label says
            chosen["temperature"] = 0
        return Sampling(**chosen, seed=seed)


class Page:
    """The page as Gradio blocks (`blocks`).

    Args:
        weights: those that a visitor may choose from.
        examples: pictures to try, in a folder that the page may serve.
        concurrency: answers generated at once; further questions wait in the queue.
    """

    def __init__(
        self,
        weights: Weights,
        defaults: Sampling,
        *,
        examples: list[Path],
        concurrency: int,
    ):
        self.weights, self.examples = weights, examples
        self._length_penalty = defaults.length_penalty  # of beam search; the page has no slider
        self._cancels: dict[str, threading.Event] = {}  # of the sessions being answered
        first = weights.get(weights.default)
        self._begins_blind = not first.can_see
        self._generations = {weights.default: first.generation}  # of the weights that were loaded
        with gr.Blocks(title="MiniMind-V", analytics_enabled=False) as self.blocks:
            self.parts = Layout(
                defaults,
                weight=weights.default,
                choices=self._choices(),
                num_layers=first.model.config.num_hidden_layers,
                can_think=first.can_think,
                examples=examples,
            )
            self._wire(concurrency)

    def _choices(self) -> list[tuple[str, str]]:
        return [(shown, name) for name, shown in self.weights.names().items()]

    def _wire(self, concurrency: int) -> None:
        """Connect events to handlers; answers and attention maps are queued, others run at once."""
        at = self.parts
        asked = [at.turns, at.current, at.language, at.seed, *at.sliders, at.thinking]
        rest = [at.turns, at.chat, at.box, at.status, at.stop, at.again, at.share]
        queued: dict[str, Any] = {
            "concurrency_id": "answers",
            "concurrency_limit": concurrency,
            **PRIVATE,
        }
        answer = {"show_progress": "minimal", "show_progress_on": at.chat, **queued}
        at.box.submit(self._ask, [at.box, *asked], rest, **answer)
        at.again.click(self._regenerate, asked, rest, **answer)
        gr.on(
            [at.look_go.click, at.look_layer.release],
            self._look,
            [at.turns, at.current, at.language, at.look_image, at.look_layer],
            [at.look_picture, at.look_share, at.status],
            **queued,
        )
        at.weight.select(
            self._switch,
            [at.weight, at.current, at.language],
            [at.weight, at.current, at.look_layer, at.status, at.thinking, *at.sliders],
            concurrency_limit=1,
            **PRIVATE,
        )
        at.stop.click(self._stop, None, None, **AT_ONCE)
        saved = at.share.click(
            self._share, [at.turns, at.language], at.shared, concurrency_limit=2, **PRIVATE
        )
        saved.success(None, at.shared, None, js=DOWNLOAD, show_progress="hidden", **PRIVATE)
        everything = [*rest, at.look_picture, at.look_share]
        gr.on([at.clear.click, at.chat.clear], self._clear, at.language, everything, **AT_ONCE)
        at.gallery.select(self._add_example, at.box, at.box, **AT_ONCE)
        at.camera.input(self._add_photo, [at.camera, at.box], [at.camera, at.box], **AT_ONCE)
        at.language.input(self._speak, at.language, at.named_parts(), **AT_ONCE)
        arrived = [at.language, at.status, *at.named_parts()]
        self.blocks.load(self._arrive, None, arrived, **AT_ONCE)
        self.blocks.unload(self._stop)  # a visitor who leaves does not keep others waiting

    def _speak(self, language: str) -> Updates:
        """All texts in the chosen language."""
        return self.parts.texts(LANGUAGES[language])

    def _arrive(self, request: gr.Request) -> Updates:
        """Set up a visitor's page: current weights, the browser's language, a warning if blind."""
        code = page_language(request.headers.get("accept-language"))
        language = next(name for name, own in LANGUAGES.items() if own == code)
        texts = self.parts.texts(code)
        texts[self.parts.weight] |= {"choices": self._choices(), "interactive": True}
        if self._begins_blind:  # else the status stays: a quick visitor may have switched already
            texts[self.parts.status] = text("blind", code, weight=self.weights.default)
        return texts | {self.parts.language: language}

    def _stop(self, request: gr.Request) -> None:
        cancel = self._cancels.get(request.session_hash)
        if cancel is not None:
            cancel.set()

    def _ask(
        self, request: gr.Request, box: Box, turns: list[ChatTurn], *choices: Any
    ) -> Iterator[Updates]:
        """Answer the question in the box."""
        wish = Wish.of(request, *choices)
        default_question = text(f"describe_{self._generations[wish.weight]}", wish.language)
        try:
            turn = new_turn(box["text"], box["files"], default_question=default_question)
        except ValueError as error:
            yield self._warn("refused", wish.language, error=error)
            return
        yield from self._answer([*turns, turn], wish, before=turns, box=box)

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
        at, language = self.parts, wish.language
        if wish.session in self._cancels:
            yield self._warn("busy", language)
            return
        cancel = self._cancels[wish.session] = threading.Event()
        try:
            yield self._running(turns, language) | ({at.box: None} if box else {})
            yield from self._generate(turns, wish, cancel)
            yield self._done(turns, language)
        except Exception as error:  # any error is shown to the visitor and frees the slot
            if not isinstance(error, ValueError | OSError):
                log.exception("an answer failed")
                shown: Exception | str = text("bug", language)
            else:
                shown = error
            self._warn("failed", language, error=shown)
            yield self._done(before, language) | ({at.box: box} if box else {})
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
        with engine.stream(*prompt_of(engine, turns), sampling, cancel=cancel) as pieces:
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

    def _running(self, turns: list[ChatTurn], language: str) -> Updates:
        at = self.parts
        return {
            at.chat: _shown(turns, language),
            at.status: "…",
            at.stop: gr.update(interactive=True),
            at.again: gr.update(interactive=False),
        }

    def _done(self, turns: list[ChatTurn], language: str) -> Updates:
        """The page between answers."""
        at = self.parts
        return {
            at.turns: turns,
            at.chat: _shown(turns, language),
            at.status: turns[-1].note if turns else "",
            at.stop: gr.update(interactive=False),
            at.again: gr.update(interactive=bool(turns)),
            at.share: gr.update(interactive=bool(turns)),
        }

    def _share(self, turns: list[ChatTurn], language: str) -> str:
        """The conversation as HTML text; the browser makes a file of it, the server none."""
        return web_chat.to_html(turns, language=LANGUAGES[language], text=text)

    def _clear(self, language: str, request: gr.Request) -> Updates:
        if request.session_hash in self._cancels:
            return self._warn("busy", LANGUAGES[language])
        at = self.parts
        gone = dict.fromkeys((at.box, at.look_picture, at.look_share))
        return self._done([], LANGUAGES[language]) | gone

    def _add_example(self, box: Box, event: gr.SelectData) -> Box:
        if event.index not in range(len(self.examples)):
            return box
        return box | {"files": [*box["files"], str(self.examples[event.index])]}

    def _add_photo(self, photo: str | None, box: Box) -> tuple[None, Box]:
        return None, (box | {"files": [*box["files"], photo]} if photo else box)

    def _switch(self, wanted: str, current: str, language: str) -> Updates:
        """Load another weight; if that fails, keep the current one."""
        at, code = self.parts, LANGUAGES[language]
        try:
            engine = self.weights.get(wanted)
        except (ValueError, OSError):
            log.exception("%r was picked and does not load", wanted)
            self._warn("not_loaded", code, weight=wanted)
            return {at.weight: current}
        layers = engine.model.config.num_hidden_layers
        key = "loaded" if engine.can_see else "blind"
        return self._of_generation(wanted, current, engine) | {
            at.current: wanted,
            at.look_layer: gr.update(maximum=layers, value=0),
            at.status: text(key, code, weight=wanted),
        }

    def _of_generation(self, wanted: str, current: str, engine: VLMEngine) -> Updates:
        """Another generation brings its own defaults of sampling, and the switch for thinking or
        not; within one, what the visitor has set stays."""
        before = self._generations[current]
        self._generations[wanted] = engine.generation
        if engine.generation == before:
            return {}
        at, own = self.parts, self.weights.sampling(engine)
        values = (getattr(own, key) for key in LIMITS)
        thinking = gr.update(visible=engine.can_think, value=own.open_thinking)
        return dict(zip(at.sliders, values, strict=True)) | {at.thinking: thinking}

    def _look(
        self, turns: list[ChatTurn], weight: str, language: str, image: int, layer: int
    ) -> Updates:
        """Draw the attention map of the last answer over a picture."""
        at, code = self.parts, LANGUAGES[language]
        if not turns or not turns[-1].answer or not any(turn.images for turn in turns):
            return self._warn("nothing_to_look_at", code)
        wanted = int(layer) - 1 if layer else None
        try:
            engine = self.weights.get(weight)
            messages, images = prompt_of(engine, turns)
            shown = min(max(int(image or 1), 1), len(images)) - 1
            pixels = engine.processor.pixel_values(images)
            maps = engine.look(messages, pixels, turns[-1].answer, layer=wanted)
        except (ValueError, OSError) as error:
            return self._warn("failed", code, error=error)
        (picture,) = engine.processor.pictures(pixels[shown : shown + 1])
        share = text("look_share", code, share=maps[shown].sum().item())
        return {at.look_picture: draw_look(picture, maps[shown]), at.look_share: share}

    def _warn(self, key: str, language: str, **values: Any) -> Updates:
        """Show a message, escaped since Gradio renders it as HTML; the page stays as it is."""
        values = {k: without_paths(v) if k == "error" else v for k, v in values.items()}
        gr.Warning(html.escape(text(key, language, **values)))
        return {self.parts.status: gr.skip()}


def _shown(turns: list[ChatTurn], language: str) -> list[dict[str, Any]]:
    """The turns as the page's chat has them."""
    return chat_messages(turns, thinking=text("thinking", language))
