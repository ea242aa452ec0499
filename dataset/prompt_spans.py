"""Owns a sample's prompt as spans: each token, or all placeholders of an image, and its kind."""

from dataclasses import dataclass

from PIL import Image
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import IGNORE_INDEX, Processor, Sample

VISIBLE = str.maketrans({"\n": "↵", " ": "␣", "\t": "⇥"})
PART = "·"  # a token that holds only part of a character


@dataclass(frozen=True)
class Span:
    """Tokens shown as one box: a single token, or all placeholders of one image.

    kind: "text", "image" or "supervised".
    """

    text: str
    kind: str
    num_tokens: int = 1
    picture: Image.Image | None = None

    @property
    def shown(self) -> str:
        """White space made visible, but not in the caption of an image."""
        return self.text if self.picture else self.text.translate(VISIBLE)


def decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token. A character of several tokens is the text of its last one; the
    others have `PART`."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[start:end]))
        is_part = text.endswith("\ufffd") and end - start < 4  # UTF-8 has four bytes at most
        texts.append(PART if is_part else text)
        start = start if is_part else end
    return texts


def spans_of(sample: Sample, processor: Processor) -> list[Span]:
    """A sample's tokens in order, as boxes to draw."""
    pictures = iter(processor.pictures(sample.pixel_values))
    per_image = len(processor.image_ids)
    texts = decoded(sample.input_ids.tolist(), processor.tokenizer)
    is_image, labels = sample.image_mask.tolist(), sample.labels.tolist()
    spans, position = [], 0
    while position < len(texts):
        if is_image[position]:
            text = f"image, {per_image} tokens"
            spans.append(Span(text, "image", per_image, next(pictures)))
            position += per_image
            continue
        kind = "text" if labels[position] == IGNORE_INDEX else "supervised"
        spans.append(Span(texts[position], kind))
        position += 1
    return spans
