"""Owns the web page's event handlers.

A visitor's conversation and weight are state of the visitor's session; the loaded models are
shared. Answers wait in one queue.
"""

import logging
from pathlib import Path
from typing import Any

import gradio as gr

from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling
from model.serving.web import conversation as web_chat
from model.serving.web.answers import Answers, Box, Talk, Updates, status_line
from model.serving.web.attention_picture import draw_look
from model.serving.web.conversation import ChatTurn, prompt_of
from model.serving.web.layout import LIMITS, Layout
from model.serving.web.protection.care import MAX_SESSIONS
from model.serving.web.protection.keeping import Kept
from model.serving.web.text import LANGUAGES, page_language, text
from model.serving.web.weights import Weights
from model.serving.web.wish import Wish as Wish

log = logging.getLogger(__name__)

LOOKS_AT_ONCE = 2  # attention maps: they are computed apart from the batch of answers
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", **PRIVATE}
IN_BROWSER: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}  # functions of `page.js`


class Page(Answers):
    """The page as Gradio blocks (`blocks`).

    Args:
        weights: those that a visitor may choose from.
        examples: pictures to try, in a folder that the page may serve.
        concurrency: answers decoded at once; further questions wait in the queue.
        kept: conversations for pages that are opened again.
    """

    def __init__(
        self,
        weights: Weights,
        defaults: Sampling,
        *,
        examples: list[Path],
        concurrency: int,
        kept: Kept[Talk] | None = None,
    ):
        super().__init__(
            weights,
            examples=examples,
            length_penalty=defaults.length_penalty,
            kept=kept or Kept(max_kept=MAX_SESSIONS),
        )
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
        asked = [at.turns, at.current, at.language, at.ticket, at.seed, *at.sliders, at.thinking]
        rest = [at.turns, at.chat, at.box, at.status, at.share]
        queued: dict[str, Any] = {
            "concurrency_id": "answers",
            "concurrency_limit": concurrency,
            **PRIVATE,
        }
        answer = {"show_progress": "minimal", "show_progress_on": at.chat, **queued}
        # More than once: who asks before the answer has ended is told so.
        at.box.submit(self._ask, [at.box, *asked], rest, trigger_mode="multiple", **answer)
        gr.on([card.click for card in at.cards], self._ask_suggestion, asked, rest, **answer)
        at.chat.retry(self._regenerate, asked, rest, **answer)
        gr.on(
            [at.look_go.click, at.look_layer.release],
            self._look,
            [at.turns, at.current, at.language, at.look_image, at.look_layer],
            [at.look_picture, at.look_share, at.status],
            concurrency_limit=LOOKS_AT_ONCE,
            concurrency_id="looks",
            **PRIVATE,
        )
        fits_weight = [at.weight, at.current, at.look_layer, at.status, at.thinking, *at.sliders]
        begin = [at.about, *at.cards]
        at.weight.select(
            self._switch,
            [at.weight, at.current, at.language],
            [*fits_weight, *begin],
            concurrency_limit=1,
            **PRIVATE,
        )
        at.box.stop(self._stop, None, None, **AT_ONCE)
        saved = at.share.click(
            self._share, [at.turns, at.language], at.shared, concurrency_limit=2, **PRIVATE
        )
        saved.success(None, at.shared, None, js="(page) => minimind.save(page)", **IN_BROWSER)
        talk = [at.turns, at.language, at.current, at.ticket]
        everything = [*rest, at.look_picture, at.look_share]
        at.clear.click(self._clear, [at.language, at.ticket], everything, **AT_ONCE)
        at.chat.undo(self._edit, talk, rest, **AT_ONCE)
        at.gallery.select(self._add_example, at.box, at.box, **AT_ONCE)
        at.camera.input(self._add_photo, [at.camera, at.box], [at.camera, at.box], **AT_ONCE)
        spoken = [*at.named_parts(), *begin]
        at.language.input(self._speak, [at.language, at.current], spoken, **AT_ONCE)
        at.language.change(None, at.language, None, js="(l) => minimind.speak(l)", **IN_BROWSER)
        arrived = [at.ticket, at.browser, at.language, *spoken, *rest, *fits_weight]
        self.blocks.load(
            self._arrive,
            at.browser,
            list(dict.fromkeys(arrived)),
            js="() => minimind.kept()",
            **AT_ONCE,
        ).success(None, at.browser, None, js="(ticket) => minimind.keep(ticket)", **IN_BROWSER)
        self.blocks.unload(self._stop)  # a visitor who leaves does not keep others waiting

    def _speak(self, language: str, weight: str) -> Updates:
        """All texts in the chosen language."""
        code = LANGUAGES[language]
        return self.parts.texts(code) | self._begin(weight, code)

    def _begin(self, weight: str, code: str) -> Updates:
        """What the empty page shows of a weight."""
        taught = self.weights.taught(weight)
        shown = taught.suggestions(self.examples, code, text)
        return self.parts.begin(taught.told(code, text), shown)

    def _arrive(self, request: gr.Request, browser: str) -> Updates:
        """Set up a visitor's page: current weights, the language, a warning if blind, and the
        conversation that this tab of the browser has had, if it is still kept.

        Args:
            browser: the ticket that it keeps and the language chosen there, if any.
        """
        ticket, _, chosen = browser.partition(" ")
        header = request.headers.get("accept-language")
        code = chosen if chosen in LANGUAGES.values() else page_language(header)
        language = next(name for name, own in LANGUAGES.items() if own == code)
        at, weight = self.parts, self.weights.default
        updates = at.texts(code) | self._begin(weight, code) | {at.language: language}
        if self._begins_blind:  # else the status stays: a quick visitor may have switched already
            updates[at.status] = status_line(text("blind", code, weight=weight))
        talk = self._kept.get(ticket)
        if talk is None:
            ticket = self._kept.new_ticket()
        else:
            if talk.weight != weight:
                updates |= self._switch(talk.weight, weight, language)
            updates |= self._done(talk.turns, code)
        picker = {"choices": self._choices(), "interactive": True}
        updates[at.weight] = (
            at.texts(code)[at.weight] | picker | {"value": updates.get(at.current, weight)}
        )
        return updates | {at.ticket: ticket, at.browser: ticket}

    def _share(self, turns: list[ChatTurn], language: str) -> str:
        """The conversation as HTML text; the browser makes a file of it, the server none."""
        return web_chat.to_html(turns, language=LANGUAGES[language], text=text)

    def _clear(self, language: str, ticket: str, request: gr.Request) -> Updates:
        if request.session_hash in self._cancels:
            return self._warn("busy", LANGUAGES[language])
        at = self.parts
        self._kept.drop(ticket)
        gone = dict.fromkeys((at.look_picture, at.look_share))
        return self._done([], LANGUAGES[language], box={"text": "", "files": []}) | gone

    def _edit(
        self, request: gr.Request, turns: list[ChatTurn], language: str, weight: str, ticket: str
    ) -> Updates:
        """Take the last question back into the box, to be asked otherwise."""
        if request.session_hash in self._cancels:
            return self._warn("busy", LANGUAGES[language])
        if not turns:
            return {self.parts.status: gr.skip()}
        *before, last = turns
        self._keep(ticket, before, weight)
        box: Box = {"text": last.question, "files": last.images}
        return self._done(before, LANGUAGES[language], box=box)

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
            begin = self._begin(wanted, code)
        except (ValueError, OSError):
            log.exception("%r was picked and does not load", wanted)
            self._warn("not_loaded", code, weight=wanted)
            return {at.weight: current}
        layers = engine.model.config.num_hidden_layers
        key = "loaded" if engine.can_see else "blind"
        fitting = self._of_generation(wanted, current, engine)
        return (
            begin
            | fitting
            | {
                at.current: wanted,
                at.look_layer: gr.update(maximum=layers, value=0),
                at.status: status_line(text(key, code, weight=wanted)),
            }
        )

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
