"""Owns the parts of the web page and their layout."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from model.generation.sampling import Sampling
from model.serving.web.conversation import MAX_QUESTION_CHARACTERS
from model.serving.web.suggestions import MAX_SUGGESTIONS, Suggestion
from model.serving.web.text import LANGUAGES, text

LIMITS = {  # of each slider: from, to (a flag's default outside widens it), step
    "temperature": (0, 2, 0.05),
    "top_p": (0.05, 1, 0.05),
    "top_k": (0, 200, 1),
    "repetition_penalty": (1, 2, 0.05),
    "max_new_tokens": (1, 2048, 1),
    "num_beams": (1, 8, 1),
}


class Layout:
    """Makes the parts, within open Gradio blocks.

    Args:
        choices: of the weight: (what is shown, name).
        num_layers, can_think: of the first weight's model.
    """

    def __init__(
        self,
        defaults: Sampling,
        *,
        weight: str,
        choices: list[tuple[str, str]],
        num_layers: int,
        can_think: bool,
        examples: list[Path],
    ):
        self._texts: dict[gr.blocks.Block, dict[str, str]] = {}  # part -> property -> text
        self.turns, self.current, self.ticket = gr.State([]), gr.State(weight), gr.State("")
        with gr.Row(elem_id="head"):
            self._named(gr.HTML(elem_id="title"), value="head")
            self.language = gr.Radio(
                list(LANGUAGES),
                value="English",
                show_label=False,
                container=False,
                elem_id="language",
            )
            self._named(self.language, label="language")
            gr.Button("☰", elem_id="tools_button", size="sm", min_width=40)
        with gr.Row(elem_id="body"):
            with gr.Column(elem_id="talk"):
                self._add_chat()
                self._add_bar()
                self._add_box()
            with gr.Column(elem_id="tools"):
                self._add_sources(weight, choices, examples)
                self._add_look(num_layers)
                self._add_sampling(defaults, can_think=can_think)
        # On their way to the browser and back: a saved page; ticket and language that it keeps.
        self.shared = gr.Textbox(visible="hidden")
        self.browser = gr.Textbox(visible="hidden")

    def _named(self, part: Any, **texts: str) -> Any:
        """Make properties of a part follow the language: property -> key of its text."""
        self._texts[part] = texts
        for name, key in texts.items():
            setattr(part, name, text(key, "en"))
        return part

    def named_parts(self) -> list[Any]:
        """All parts whose texts follow the language."""
        return list(self._texts)

    def texts(self, language: str) -> dict[Any, Any]:
        """Part -> update of its texts to "en" or "zh"."""
        return {
            part: gr.update(**{name: text(key, language) for name, key in texts.items()})
            for part, texts in self._texts.items()
        }

    def begin(self, about: str, suggestions: list[Suggestion]) -> dict[Any, Any]:
        """Updates of what the empty page shows of a weight."""
        updates = {self.about: f"<p>{html.escape(about)}</p>"}
        for i, card in enumerate(self.cards):
            shown: dict[str, Any] = {"visible": i < len(suggestions)}
            if i < len(suggestions):
                shown |= {"value": suggestions[i].question, "icon": str(suggestions[i].picture)}
            updates[card] = gr.update(**shown)
        return updates

    def _add_chat(self) -> None:
        """The conversation and, in its place while it is empty, what can be asked."""
        with gr.Column(elem_id="stage"):
            self.chat = gr.Chatbot(
                height="100%",
                elem_id="chat",
                show_label=False,
                placeholder=" ",
                buttons=["copy"],
                render_markdown=False,
                allow_tags=False,
                latex_delimiters=[],
                feedback_options=None,
                allow_file_downloads=False,
                group_consecutive_messages=False,
            )
            with gr.Column(elem_id="begin"):
                self._named(gr.HTML(), value="begin")
                self.about = gr.HTML(elem_id="about")
                with gr.Row(elem_id="cards"):
                    self.cards = [
                        gr.Button(visible=False, elem_id=f"card_{i}", elem_classes="card")
                        for i in range(MAX_SUGGESTIONS)
                    ]

    def _add_box(self) -> None:
        self.box = gr.MultimodalTextbox(
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            show_label=False,
            max_lines=8,
            max_plain_text_length=MAX_QUESTION_CHARACTERS,
            elem_id="box",
        )
        self._named(self.box, placeholder="question", label="box")

    def _add_bar(self) -> None:
        """Between conversation and box: the status, and what is done with the whole of it."""
        with gr.Row(elem_id="bar"):
            self.status = gr.HTML(elem_id="status")
            self.clear = self._named(gr.Button(size="sm", elem_id="clear"), value="clear")
            self.share = self._named(
                gr.Button(size="sm", interactive=False, elem_id="share"), value="share"
            )

    def _add_sources(
        self, weight: str, choices: list[tuple[str, str]], examples: list[Path]
    ) -> None:
        """The weight, example pictures and camera."""
        self.weight = self._named(
            # Not before its choices are those of now: a choice made earlier would be lost.
            gr.Dropdown(choices, value=weight, elem_id="weight", interactive=False),
            label="weight",
        )
        with self._named(gr.Accordion(open=False, elem_id="pictures"), label="examples"):
            self.gallery = gr.Gallery(
                [str(path) for path in examples],
                columns=4,
                rows=2,
                height="auto",
                show_label=False,
                allow_preview=False,
                buttons=[],
                elem_id="examples",
            )
        with self._named(gr.Accordion(open=False, elem_id="camera"), label="camera"):
            self.camera = gr.Image(
                sources=["webcam"], type="filepath", image_mode=None, show_label=False
            )

    def _add_look(self, num_layers: int) -> None:
        with self._named(gr.Accordion(open=False, elem_id="look"), label="look"):
            self._named(gr.Markdown(), value="look_help")
            self.look_image = gr.Number(1, minimum=1, precision=0)
            self.look_layer = gr.Slider(0, num_layers, 0, step=1)
            self.look_go = gr.Button(elem_id="look_go")
            self.look_picture = gr.Image(
                show_label=False,
                interactive=False,
                format="png",
                buttons=["download"],
                elem_id="look_picture",
            )
            self.look_share = gr.Markdown()
        self._named(self.look_image, label="look_image")
        self._named(self.look_layer, label="look_layer")
        self._named(self.look_go, value="look_go")

    def _add_sampling(self, defaults: Sampling, *, can_think: bool) -> None:
        self.thinking = self._named(
            gr.Checkbox(defaults.open_thinking, visible=can_think, elem_id="thinking"),
            label="open_thinking",
        )
        with self._named(gr.Accordion(open=False, elem_id="sampling"), label="sampling"):
            self.sliders = [
                self._named(_slider(key, getattr(defaults, key)), label=key) for key in LIMITS
            ]
            seed = "" if defaults.seed is None else str(defaults.seed)
            self.seed = gr.Textbox(seed, max_lines=1, elem_id="seed")
        self._named(self.seed, label="seed")


def _slider(key: str, default: float) -> gr.Slider:
    """A slider whose range holds its default: out of range, Gradio would refuse every question."""
    low, high, step = LIMITS[key]
    return gr.Slider(min(low, default), max(high, default), default, step=step, elem_id=key)
