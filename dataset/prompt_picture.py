"""Owns the prompt picture: the tokens of a record, coloured as text, image or supervised.

    python -m dataset.prompt_picture --data_path my/train.jsonl --images_path my/images --index 3

Shows a record as training sees it: with the chat template around it, in place of each image's
placeholders the picture cut into its patches, and in green the supervised tokens.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageDraw, ImageFont

from dataset.lm_dataset import BadSample, VLMDataset
from dataset.prompt_spans import PART, Span, spans_of

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

COLOURS = {"text": "#e8eaed", "image": "#aecbfa", "supervised": "#b7e1cd"}
LEGEND = {
    "text": "text, not supervised",
    "image": "image placeholder",
    "supervised": "supervised: the loss counts it",
}
WIDTH, MARGIN, GAP = 1000, 16, 3  # pixels
FONT_SIZE, LINE_HEIGHT, PICTURE_SIDE = 17, 30, 200


@lru_cache(maxsize=1)
def system_fonts() -> list[Path]:
    """Font files of this computer."""
    from matplotlib import font_manager  # slow to import

    return sorted(Path(path) for path in font_manager.findSystemFonts())


def open_font(path: Path, *, characters: set[str]) -> tuple[Font, set[str]]:
    """A font, and those of the characters that it has: none if the file cannot be used."""
    from matplotlib.ft2font import FT2Font

    try:
        glyphs = FT2Font(str(path)).get_charmap()
        return ImageFont.truetype(str(path), FONT_SIZE), {c for c in characters if ord(c) in glyphs}
    except (OSError, RuntimeError):  # a bitmap font, a damaged file
        return ImageFont.load_default(FONT_SIZE), set()


def choose_fonts(characters: set[str]) -> dict[str, Font]:
    """A font for every character that an installed font has.

    matplotlib's own DejaVu Sans comes first; the characters that it lacks, such as Chinese, come
    from the system's font that has most of them.
    """
    from matplotlib import get_data_path

    own = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font, found = open_font(own, characters=characters)
    fonts = dict.fromkeys(found, font)
    rest = characters - found
    if rest:
        choices = [open_font(path, characters=rest) for path in system_fonts()]
        font, found = max(choices, key=lambda choice: len(choice[1]), default=(font, set()))
        fonts |= dict.fromkeys(found, font)
    return fonts


class Writer:
    """Draws text in several fonts; a character in none of them is drawn as its code, \\u7ea2."""

    def __init__(self, texts: list[str]):
        needed = set("".join(texts)) | set(f"\\u{'0123456789abcdef'}") | {PART}
        self.fonts = choose_fonts(needed)
        self.missing = needed - self.fonts.keys()

    def pieces(self, text: str) -> Iterator[tuple[str, Font]]:
        for character in text:
            shown = character if character in self.fonts else f"\\u{ord(character):04x}"
            for one in shown:
                yield one, self.fonts[one]

    def width(self, text: str) -> float:
        return sum(font.getlength(one) for one, font in self.pieces(text))

    def draw(self, draw: ImageDraw.ImageDraw, x: float, baseline: float, text: str) -> None:
        for one, font in self.pieces(text):
            draw.text((x, baseline), one, fill="black", font=font, anchor="ls")
            x += font.getlength(one)


def layout(spans: list[Span], width_of: Callable[[str], float]) -> tuple[list[Box], int]:
    """Boxes of the spans, in lines, and the y at which the last line ends."""
    boxes: list[Box] = []
    x: float = MARGIN
    y, line_height = 0, LINE_HEIGHT
    for span in spans:
        width = width_of(span.shown) + 8
        height = LINE_HEIGHT
        if span.picture is not None:
            width, height = max(width, PICTURE_SIDE + 8), PICTURE_SIDE + LINE_HEIGHT + 4
        if x + width > WIDTH - MARGIN and x > MARGIN:
            x, y, line_height = MARGIN, y + line_height + GAP, LINE_HEIGHT
        boxes.append((x, y, x + width, y + height))
        x, line_height = x + width + GAP, max(line_height, height)
        if span.text.endswith("\n"):
            x, y, line_height = MARGIN, y + line_height + GAP, LINE_HEIGHT
    return boxes, y + line_height


def draw_patches(picture: Image.Image, num_tokens: int) -> Image.Image:
    """The picture with a line between the patches that become tokens."""
    picture = picture.resize((PICTURE_SIDE, PICTURE_SIDE))
    draw, per_side = ImageDraw.Draw(picture), math.isqrt(num_tokens)  # a kept CLS token is no patch
    for i in range(1, per_side):
        at = round(i * PICTURE_SIDE / per_side)
        draw.line((at, 0, at, PICTURE_SIDE), fill="white")
        draw.line((0, at, PICTURE_SIDE, at), fill="white")
    return picture


def draw_prompt(spans: list[Span], *, title: str) -> tuple[Image.Image, set[str]]:
    """The picture, and the characters that no installed font has."""
    writer = Writer([title, *LEGEND.values(), *(s.shown for s in spans)])
    boxes, height = layout(spans, writer.width)
    head = 3 * LINE_HEIGHT
    canvas = Image.new("RGB", (WIDTH, head + math.ceil(height) + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    writer.draw(draw, MARGIN, 26, title)
    x: float = MARGIN
    for kind, meaning in LEGEND.items():
        draw.rectangle((x, 43, x + 16, 59), fill=COLOURS[kind])
        writer.draw(draw, x + 22, 57, meaning)
        x += 22 + writer.width(meaning) + 28
    for span, (left, top, right, bottom) in zip(spans, boxes, strict=True):
        top, bottom = top + head, bottom + head
        draw.rounded_rectangle((left, top, right, bottom), 4, fill=COLOURS[span.kind])
        writer.draw(draw, left + 4, top + 21, span.shown)
        if span.picture is not None:
            patches = draw_patches(span.picture, span.num_tokens)
            canvas.paste(patches, (round(left) + 4, round(top) + LINE_HEIGHT))
    return canvas, writer.missing


def picture_of_record(dataset: VLMDataset, index: int) -> tuple[Image.Image, set[str]]:
    """The prompt picture of one record; see `draw_prompt`.

    Raises:
        ValueError: no such record, or one that cannot be used.
    """
    if not 0 <= index < len(dataset):
        raise ValueError(
            f"--index {index}: {dataset.data_path} has records 0 to {len(dataset) - 1}"
        )
    sample = dataset[index]
    if isinstance(sample, BadSample):
        raise ValueError(sample.reason)
    spans = spans_of(sample, dataset.processor)
    counts = {kind: sum(s.num_tokens for s in spans if s.kind == kind) for kind in COLOURS}
    place = sample.where.rsplit("/", 1)[-1]
    title = (
        f"{place}: {len(sample.input_ids)} tokens = {counts['text']} text + "
        f"{counts['image']} image + {counts['supervised']} supervised"
    )
    if sample.is_truncated:
        title += f", cut at {dataset.max_length}"
    return draw_prompt(spans, title=title)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", type=Path, required=True, help="JSONL or Parquet / 数据文件")
    add("--images_path", type=Path, help="folder or zip of its images / 图像目录或 zip")
    add("--index", type=int, default=0, help="which record, from 0 / 第几条记录")
    add("--max_seq_len", type=int, default=1536, help="tokens of a sample / 最大长度")
    add("--vision_model_path", type=Path, help="folder of the tower / 视觉模型目录")
    add("--tokenizer_path", type=Path, help="folder of the tokenizer / 分词器目录")
    add("--out", type=Path, default=Path("prompt.png"), help="the PNG / 输出图片")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Draw the picture; returns the exit status."""
    from model.machine.atomic_file import atomic_write
    from model.vision_tower import find_vision_dir, load_image_processor, load_vision_config
    from model.vlm_processor import VLMProcessor, load_tokenizer
    from model.weights.build_model import placeholder_config

    args = parse_args(argv)
    try:
        tokenizer = load_tokenizer(args.tokenizer_path)
        config = placeholder_config({}, tokenizer, args.vision_model_path)
        tower = find_vision_dir(args.vision_model_path)
        image_processor = load_image_processor(tower, load_vision_config(tower))
        processor = VLMProcessor(tokenizer, image_processor, config=config)
        dataset = VLMDataset(
            args.data_path, args.images_path, processor, max_length=args.max_seq_len
        )
        picture, missing = picture_of_record(dataset, args.index)
        atomic_write(args.out, lambda file: picture.save(file, "PNG"))
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    if missing:
        some = " ".join(sorted(missing)[:8])
        print(
            f"no font here has {some}, so they are shown as codes; install one, such as the "
            "package fonts-noto-cjk",
            file=sys.stderr,
        )
    print(f"prompt picture: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
