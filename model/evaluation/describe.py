"""Owns describing a folder: which pictures belong together, their answers, the HTML gallery."""

import base64
import html
import io
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from model.evaluation.task import Group
from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.generation.speed import Speed
from model.generation.thinking import THINKING, marked
from model.machine.terminal import one_line, shown
from model.vision.pictures import open_image
from model.vlm_processor import IMAGE_TAG, VLMProcessor

IMAGE_SUFFIXES = {  # HEIC and AVIF too: the error says how to convert them
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
    """The model's answer about a sample; `error` says why there is none."""

    name: str
    images: tuple[str, ...]
    answer: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    reasoning: str | None = None  # what the model thought in front of the answer
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


class FolderDescriptions:
    """The task of describing a folder: `Task[list[Description]]`.

    One rank alone prints each batch when it is described; several print all at the end.

    Args:
        samples: as `find_samples` gives them.
        with_thumbnails: keep a small picture of each image, for the gallery.
        show_speed: one rank alone prints the tokens per second of each batch to stderr.
        printing: a context in which to print.
    """

    def __init__(
        self,
        samples: list[FolderSample],
        prompt: str,
        sampling: Sampling,
        *,
        batch_size: int,
        with_thumbnails: bool,
        show_speed: bool,
        group: Group,
        printing: Callable[[], AbstractContextManager[None]],
    ):
        self.samples, self.prompt, self.sampling = samples, prompt, sampling
        self.batch_size, self.with_thumbnails = batch_size, with_thumbnails
        self.show_speed = show_speed
        self.group, self.printing = group, printing
        self.so_far: list[Description] = []  # of this rank; remains if the run is interrupted

    def run(self, engine: VLMEngine) -> list[Description]:
        """All descriptions, in order of their names."""
        self.so_far = []
        found = self.group.collect(partial(self._describe_share, engine))
        return sorted(found, key=lambda d: d.name)

    def _describe_share(self, engine: VLMEngine) -> list[Description]:
        for batch in self.group.batches(self.samples, self.batch_size):
            described, speed = describe_samples(
                engine, batch, self.prompt, self.sampling, with_thumbnails=self.with_thumbnails
            )
            self.so_far.extend(described)
            if self.group.world_size == 1:
                with self.printing():
                    print_descriptions(to_json(described))
                if self.show_speed and speed.num_tokens:
                    print(speed, file=sys.stderr, flush=True)
        return self.so_far

    def report(self, result: list[Description]) -> dict[str, Any]:
        """The descriptions, and how many samples are missing, if any."""
        report: dict[str, Any] = {"prompt": self.prompt, "seed": self.sampling.seed}
        report["decoding"] = self.sampling.decoding
        if len(result) < len(self.samples):
            report["not_described"] = len(self.samples) - len(result)
        return report | {"samples": to_json(result)}

    def print_report(self, report: dict[str, Any]) -> None:
        print_descriptions(report["samples"])

    def compare(self, first: list[Description], second: list[Description]) -> NoReturn:
        raise ValueError("descriptions have no figures to compare")

    def print_difference(self, difference: dict[str, Any]) -> None:
        """There is none."""


def describe_samples(
    engine: VLMEngine,
    samples: list[FolderSample],
    prompt: str,
    sampling: Sampling,
    *,
    with_thumbnails: bool = False,
) -> tuple[list[Description], Speed]:
    """Answers to a batch of samples, and how quickly they came; a sample that cannot be asked about
    has an error instead."""
    found: dict[int, Description] = {}
    asked, conversations = [], []
    for place, sample in enumerate(samples):
        names = tuple(path.name for path in sample.images)
        try:
            messages = ask(_repeat_tag(prompt, len(names)), num_images=len(names))
            _check_tags(messages, num_images=len(names))
            # Pictures that cannot fit are not even decoded.
            engine.context.fit(
                messages,
                max_new_tokens=sampling.max_new_tokens,
                open_thinking=sampling.open_thinking,
            )
            pixels, thumbnails = _read_images(
                engine.processor, sample.images, with_thumbnails=with_thumbnails
            )
        except (ValueError, OSError) as error:
            found[place] = Description(sample.name, names, error=str(error))
            continue
        asked.append((place, names, thumbnails))
        conversations.append((messages, pixels))
    started_s = time.perf_counter()
    answers = engine.generate(conversations, sampling) if asked else []
    speed = Speed(sum(a.num_new_tokens for a in answers), time.perf_counter() - started_s)
    for (place, names, thumbnails), answer in zip(asked, answers, strict=True):
        found[place] = Description(
            samples[place].name,
            names,
            answer.text,
            answer.finish_reason,
            reasoning=answer.reasoning,
            thumbnails=thumbnails,
        )
    return [found[place] for place in range(len(samples))], speed


def _repeat_tag(prompt: str, num_images: int) -> str:
    """A prompt with one tag gets one for each image of the sample."""
    is_for_one = prompt.count(IMAGE_TAG) == 1
    return prompt.replace(IMAGE_TAG, "\n".join([IMAGE_TAG] * num_images)) if is_for_one else prompt


def _check_tags(messages: list[dict[str, Any]], *, num_images: int) -> None:
    num_tags = messages[0]["content"].count(IMAGE_TAG)
    if num_tags != num_images:
        raise ValueError(f"--prompt has {num_tags} {IMAGE_TAG} tag(s) but {num_images} image(s)")


def _read_images(
    processor: VLMProcessor, paths: tuple[Path, ...], *, with_thumbnails: bool
) -> tuple[Tensor, tuple[str, ...]]:
    """The (I, 3, S, S) pixel values of pictures, and their thumbnails.

    One picture after another: together, the decoded photos of a folder could fill the memory.
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
    """A small JPEG of a picture, in base64; shrinks the picture in place."""
    file = io.BytesIO()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def print_descriptions(samples: list[dict[str, Any]]) -> None:
    """Print answers to stdout and errors to stderr, as `to_json` has them."""
    for sample in samples:
        if "error" in sample:
            line = one_line(f"{sample['name']}: {sample['error']}")
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            text = marked(sample["answer"], sample.get("reasoning"))
            print(f"[{one_line(sample['name'])}] {shown(text)}\n", flush=True)


def to_json(descriptions: list[Description]) -> list[dict[str, Any]]:
    """Descriptions for JSON, without thumbnails and without fields that are None."""
    kept = ({k: v for k, v in asdict(d).items() if k != "thumbnails"} for d in descriptions)
    return [{k: v for k, v in entry.items() if v is not None} for entry in kept]


def gallery(descriptions: list[Description], *, weight: str, prompt: str) -> str:
    """An HTML page with every picture and its answer; it needs no other file."""
    figures = []
    for d in descriptions:
        pictures = "".join(
            f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{data}">'
            for name, data in zip(d.images, d.thumbnails, strict=False)
        )
        text = html.escape(d.answer if d.error is None else d.error)
        if d.reasoning is not None:
            title = html.escape(THINKING)
            text = f"<details><summary>{title}</summary>{html.escape(d.reasoning)}</details>{text}"
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
