"""Owns a visitor's conversation: its limits, and its forms for model, page and saved file."""

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.generation.engine import VLMEngine, ask
from model.serving.web.protection.privacy import without_paths
from model.vision.pictures import open_image
from model.vlm_processor import Message

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000  # 150 MB as RGB; a 48-megapixel photo is fine
MAX_IMAGES_PER_TURN = 8
MAX_QUESTION_CHARACTERS = 20_000
SHARED_SIDE, SHARED_QUALITY = 768, 85  # of pictures in a shared page


@dataclass
class ChatTurn:
    """A question with its pictures, and the answer; `note` is the line of figures below it, and
    `reasoning` what the model thought first."""

    question: str
    images: list[str] = field(default_factory=list)
    answer: str = ""
    note: str = ""
    reasoning: str = ""


def check_image(path: str | Path) -> None:
    """Refuse a file that is not a picture, or is too large to decode.

    The size is read from the file's header, before any pixel is decoded.

    Raises:
        ValueError: the reason.
    """
    path = Path(path)
    name = path.name[:80]
    if path.stat().st_size > MAX_UPLOAD_BYTES:
        raise ValueError(f"{name}: larger than {MAX_UPLOAD_BYTES >> 20} MB")
    try:
        open_image(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(f"{name}: {without_paths(error)}") from error


def new_turn(question: str, images: list[str], *, default_question: str) -> ChatTurn:
    """A turn with a valid question. Its pictures were checked at upload and are not opened here.

    Raises:
        ValueError: there is no question, it is too long, or a picture has been deleted.
    """
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise ValueError(f"more than {MAX_QUESTION_CHARACTERS} characters")
    question = question.strip()
    if len(images) > MAX_IMAGES_PER_TURN:
        raise ValueError(f"{len(images)} pictures at once, {MAX_IMAGES_PER_TURN} at most")
    for image in images:
        if not Path(image).is_file():
            raise ValueError(f"{Path(image).name[:80]} is no longer here; add it again")
    if not question and not images:
        raise ValueError("there is no question")
    return ChatTurn(question or default_question, list(images))


def prompt_of(engine: VLMEngine, turns: list[ChatTurn]) -> tuple[list[Message], list[str]]:
    """The prompt for the last turn: all messages and all pictures so far."""
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        messages += ask(turn.question, num_images=len(turn.images))
        if i < len(turns) - 1:
            messages = engine.remember(messages, turn.answer)
    return messages, [image for turn in turns for image in turn.images]


def chat_messages(turns: list[ChatTurn], *, thinking: str = "") -> list[dict[str, Any]]:
    """The turns for Gradio's chat, escaped: it renders text as HTML even with Markdown off.

    Args:
        thinking: the title under which a turn's reasoning is folded.
    """
    messages = []
    for turn in turns:
        shown = [{"path": image, "alt_text": Path(image).name} for image in turn.images]
        question, answer = (html.escape(t, quote=False) for t in (turn.question, turn.answer))
        messages.append({"role": "user", "content": [*shown, question]})
        if turn.reasoning:
            folded = {"title": thinking, "status": "done"}  # Gradio opens what is "pending"
            reasoning = html.escape(turn.reasoning, quote=False)
            messages.append({"role": "assistant", "content": reasoning, "metadata": folded})
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return messages


def details(note: str, *, title: str) -> str:
    """The line of figures below an answer, folded, as HTML."""
    if not note:
        return ""
    return f"<details><summary>{html.escape(title)}</summary>{html.escape(note)}</details>"


PAGE = """<!doctype html>
<html lang="{language}"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2rem auto; padding: 0 1rem;
 color: #1f2937; background: #f8fafc; }}
section {{ margin: 1.2rem 0; padding: .8rem 1.1rem; border-radius: 12px; background: #fff;
 border: 1px solid #e5e7eb; white-space: pre-wrap; overflow-wrap: anywhere; }}
section.user {{ background: #eef2ff; border-color: #c7d2fe; }}
b {{ display: block; font-size: .8rem; color: #6b7280; }}
img {{ max-width: 100%; max-height: 360px; border-radius: 8px; margin: .3rem .3rem .3rem 0; }}
small {{ color: #6b7280; }}
</style></head><body><h1>{title}</h1>
{body}</body></html>
"""


def data_url(path: str) -> str:
    """A picture, scaled down, as the data URL of a JPEG."""
    picture = open_image(path)
    picture.thumbnail((SHARED_SIDE, SHARED_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=SHARED_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def figure(path: str, *, otherwise: str) -> str:
    """A picture as HTML; `otherwise` where its file has been deleted."""
    try:
        alt = html.escape(Path(path).stem)
        return f'<img src="{data_url(path)}" alt="{alt}">'
    except (ValueError, OSError):
        return html.escape(otherwise)


def to_html(turns: list[ChatTurn], *, language: str, text: Callable[[str, str], str]) -> str:
    """The conversation as one self-contained HTML page, all text escaped."""
    parts = []
    for turn in turns:
        images = "".join(figure(i, otherwise=text("gone", language)) for i in turn.images)
        question, answer, note = map(html.escape, (turn.question, turn.answer, turn.note))
        if turn.reasoning:
            title, reasoning = map(html.escape, (text("thinking", language), turn.reasoning))
            answer = f"<details><summary>{title}</summary>{reasoning}</details>{answer}"
        who = html.escape(text("user", language))
        parts.append(
            f'<section class="user"><b>{who}</b>{images and images + "<br>"}{question}</section>\n'
            f"<section><b>MiniMind-V</b>{answer}<br><small>{note}</small></section>\n"
        )
    title = html.escape(text("title", language))
    return PAGE.format(language=language, title=title, body="".join(parts))
