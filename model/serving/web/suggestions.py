"""Owns what a visitor is told a weight can be asked: from `taught` in the metadata beside it.

    "taught": {
      "languages": ["en", "zh"],
      "about": {"en": "coloured shapes ...", "zh": "..."},
      "questions": [{"picture": "a.png", "en": "What shape is it?", "zh": "..."}]
    }

All three are optional. A picture is the name of a file in the page's folder of examples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.weights.metadata import Metadata

MAX_SUGGESTIONS = 4  # as many as a telephone shows without scrolling
TOLD_STAGES = {"llm": "llm", "pretrain": "pretrain", "sft": "sft", "scst": "sft"}
Text = Callable[..., str]  # `text.text`


@dataclass(frozen=True)
class Suggestion:
    """A question that a visitor asks by one click, with its picture."""

    question: str
    picture: Path


@dataclass(frozen=True)
class Taught:
    """What a weight was taught; `about` and `questions` are by language, "en" or "zh"."""

    stage: str
    languages: tuple[str, ...]
    about: dict[str, str]
    questions: tuple[dict[str, str], ...]
    can_see: bool
    generation: int

    @classmethod
    def of(cls, metadata: Metadata, *, can_see: bool, generation: int) -> "Taught":
        """From a weight's metadata.

        Raises:
            ValueError: `taught` is not as described above.
        """
        taught: Any = metadata.get("taught", {})
        try:
            languages = tuple(str(name) for name in taught.get("languages", ()))
            about = {str(k): str(v) for k, v in taught.get("about", {}).items()}
            questions = tuple(
                {str(k): str(v) for k, v in question.items()}
                for question in taught.get("questions", ())
            )
        except (AttributeError, TypeError):
            raise ValueError(
                '"taught" in the metadata beside the weight is not {"languages": [...], "about": '
                '{...}, "questions": [{...}]}; mend or remove it'
            ) from None
        return cls(str(metadata.get("stage")), languages, about, questions, can_see, generation)

    def told(self, language: str, text: Text) -> str:
        """In one or two sentences what it was taught, and what becomes of other questions."""
        if not self.can_see:
            return text("taught_blind", language)
        about = self.about.get(language)
        if about is None:
            stage = TOLD_STAGES.get(self.stage, "unknown")
            return text(f"taught_{stage}", language)
        names = [text(f"language_{n}", language) for n in self.languages if n in ("en", "zh")]
        spoken = (
            text("taught_languages", language, names=text("and", language).join(names))
            if names
            else ""
        )
        return text("taught", language, about=about, languages=spoken)

    def suggestions(self, examples: list[Path], language: str, text: Text) -> list[Suggestion]:
        """Questions with pictures to ask by one click.

        Without questions in the metadata that have a picture here, all pictures can be described.
        """
        if not self.can_see:
            return []
        pictures = {path.name: path for path in examples}
        own = [
            Suggestion(question[language], pictures[question["picture"]])
            for question in self.questions
            if language in question and question.get("picture") in pictures
        ]
        describe = text(f"describe_{self.generation}", language)
        return (own or [Suggestion(describe, path) for path in examples])[:MAX_SUGGESTIONS]
