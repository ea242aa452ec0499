"""Owns describing a folder: which pictures belong together, their answers, the HTML gallery."""

import base64
import html
import io
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.machine.terminal import one_line, shown
from model.pictures import open_image
from model.vlm_processor import IMAGE_TAG, VLMProcessor

IMAGE_SUFFIXES = {  # those of HEIC and AVIF too: they are told apart and how to convert them
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif",
}  # fmt: skip
THUMBNAIL_SIDE = 224
STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(16em,1fr));gap:1.2em}
figure{margin:0;padding:.8em;border:1px solid #8884;border-radius:.5em}
figure div{display:flex;flex-wrap:wrap;gap:.4em} img{max-width:100%}
figcaption{margin-top:.5em;white-space:pre-wrap;overflow-wrap:anywhere}
.name,.prompt{color:#777;font-size:.85em;overflow-wrap:anywhere;white-space:pre-wrap}
.error{color:#b00}"""


@dataclass(frozen=True)
class FolderSample:
    """An image of a folder, or all images of one of its sub-folders."""

    name: str
    images: tuple[Path, ...]


@dataclass(frozen=True)
class Description:
    """What the model says about a sample; `error` says why it says nothing."""

    name: str
    images: tuple[str, ...]
    answer: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    thumbnails: tuple[str, ...] = ()  # JPEG in base64


def find_samples(folder: Path) -> list[FolderSample]:
    """Images of a folder, and its sub-folders that hold images, in name order.

    Raises:
        FileNotFoundError: no folder, or nothing in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--image_dir {folder} is not a folder")
    samples = []
    for path in sorted(folder.iterdir()):
        if images := _images_in(path) if path.is_dir() else _images_of(path):
            samples.append(FolderSample(path.name, images))
    if not samples:
        raise FileNotFoundError(
            f"--image_dir {folder} holds no image ({' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return samples


def _images_of(path: Path) -> tuple[Path, ...]:
    return (path,) if path.suffix.lower() in IMAGE_SUFFIXES else ()


def _images_in(folder: Path) -> tuple[Path, ...]:
    return tuple(p for p in sorted(folder.iterdir()) if not p.is_dir() and _images_of(p))


def describe(
    engine: VLMEngine,
    samples: list[FolderSample],
    prompt: str,
    sampling: Sampling,
    *,
    with_thumbnails: bool = False,
) -> list[Description]:
    """Answers to a batch of samples; a sample that cannot be asked about has an error instead."""
    asked, found = [], {}
    for place, sample in enumerate(samples):
        names = tuple(path.name for path in sample.images)
        try:
            messages = ask(_repeat_tag(prompt, len(names)), num_images=len(names))
            _check_tags(messages, num_images=len(names))
            # Pictures that cannot fit are not even decoded.
            engine.context.fit(messages, max_new_tokens=sampling.max_new_tokens)
            pixels, thumbnails = _read_images(
                engine.processor, sample.images, with_thumbnails=with_thumbnails
            )
        except (ValueError, OSError) as error:
            found[place] = Description(sample.name, names, error=str(error))
            continue
        asked.append((place, names, (messages, pixels), thumbnails))
    answers = engine.generate([a[2] for a in asked], sampling) if asked else []
    for (place, names, _, thumbnails), answer in zip(asked, answers, strict=True):
        found[place] = Description(samples[place].name, names, answer.text, answer.finish_reason,
                                   thumbnails=thumbnails)  # fmt: skip
    return [found[place] for place in range(len(samples))]


def _repeat_tag(prompt: str, num_images: int) -> str:
    """A prompt made for one image asks about all of a sample's."""
    is_for_one = prompt.count(IMAGE_TAG) == 1
    return prompt.replace(IMAGE_TAG, "\n".join([IMAGE_TAG] * num_images)) if is_for_one else prompt


def _check_tags(messages: list[dict], *, num_images: int) -> None:
    num_tags = messages[0]["content"].count(IMAGE_TAG)
    if num_tags != num_images:
        raise ValueError(f"--prompt has {num_tags} {IMAGE_TAG} tag(s) but {num_images} image(s)")


def _read_images(
    processor: VLMProcessor, paths: tuple[Path, ...], *, with_thumbnails: bool
) -> tuple[Tensor, tuple[str, ...]]:
    """The (I, 3, S, S) pixel values of pictures, and their thumbnails.

    One after another: decoded in full size, the photos of a folder could fill the memory.
    """
    pixels, thumbnails = [], []
    for path in paths:
        try:
            if not path.is_file():  # opening a pipe of this name would wait for ever
                raise FileNotFoundError("not a file, or a link to none")
            image = open_image(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path.name}: {error}" if len(paths) > 1 else str(error)) from error
        pixels.append(processor.pixel_values([image]))
        if with_thumbnails:
            thumbnails.append(_thumbnail(image))
    return torch.cat(pixels), tuple(thumbnails)


def _thumbnail(image: Image.Image) -> str:
    """A small JPEG of a picture, in base64; the picture is used up."""
    file = io.BytesIO()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def print_descriptions(descriptions: list[Description]) -> None:
    """Answers to the standard output, errors to the other one, a line each."""
    for d in descriptions:
        if d.error is None:
            print(f"[{one_line(d.name)}] {shown(d.answer)}\n", flush=True)
        else:
            line = one_line(f"{d.name}: {d.error}")
            print(f"error: {line}", file=sys.stderr, flush=True)


def to_json(descriptions: list[Description]) -> list[dict]:
    """As JSON holds them: without pictures and without what is not there."""
    kept = ({k: v for k, v in asdict(d).items() if k != "thumbnails"} for d in descriptions)
    return [{k: v for k, v in entry.items() if v is not None} for entry in kept]


def gallery(descriptions: list[Description], *, weight: str, prompt: str) -> str:
    """An HTML page with every picture and what the model says; it needs no other file."""
    figures = []
    for d in descriptions:
        pictures = "".join(
            f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{data}">'
            for name, data in zip(d.images, d.thumbnails, strict=False)
        )
        text = html.escape(d.answer if d.error is None else d.error)
        kind = "" if d.error is None else ' class="error"'
        figures.append(
            f"<figure><div>{pictures}</div><figcaption{kind}>{text}</figcaption>"
            f'<span class="name">{html.escape(d.name)}</span></figure>'
        )
    title = html.escape(weight)
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        f'<p class="prompt">{html.escape(prompt)}</p><div class="grid">\n'
        + "\n".join(figures)
        + "\n</div></body></html>\n"
    )
