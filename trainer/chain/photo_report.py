"""Owns the report of the chain on photos: the table of scores beside published ones, and a picture
of curves and answers.
"""

import textwrap
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from dataset.records.images import open_images
from model.machine.atomic_file import atomic_write
from trainer.chain.photo_settings import CAPTIONS_WEIGHT, MODEL, NUM_BEAMS, WEIGHT, Photos
from trainer.chain.photo_steps import records
from trainer.chain.taught import photo_name
from trainer.tracking.curves import METRICS_SUFFIX, draw_curve, read_metrics

LANGUAGES = {"en": "English", "zh": "Chinese"}
FIGURES = {  # of the scores -> (what the table calls it, number format)
    "loss": ("loss, nats per token", ".3f"),
    "gap_shuffled": ("gap to another photo, nats", ".3f"),
    "recall": ("right caption likeliest", ".1%"),
    "recall_shuffled": ("  with another's photo", ".1%"),
    "gain_recall": ("right caption gains most", ".1%"),
    "gain_recall_shuffled": ("  with another's photo", ".1%"),
    "cider_d": ("CIDEr-D", ".3f"),
    "bleu": ("BLEU-1 to 4, sacrebleu", ".1f"),
    "jieba_bleu": ("BLEU-1 to 4, jieba's words", ".1f"),
    "papers_bleu": ("BLEU-1 to 4, papers' way", ".1f"),
}
# Of the published Flickr8k test photos: BLEU-1 to 4.
PUBLISHED = {
    "NeuralTalk (Karpathy and Fei-Fei 2015)": "57.9 38.3 24.5 16.0",
    "Show, Attend and Tell (Xu et al. 2015), soft": "67   44.8 29.9 19.5",
    "Show, Attend and Tell (Xu et al. 2015), hard": "67   45.7 31.4 21.3",
}
NUM_PHOTOS, COLUMNS = 12, 4
MAX_LINES = 3  # of one answer
# Fonts with Chinese characters, in order of preference.
FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A photo with the model's answer, and one of a person, by language."""

    image: bytes
    answers: dict[str, str]
    references: dict[str, str]


def print_table(scores: dict[str, Any]) -> None:
    """The figures of both languages; English captions beside published ones."""
    every = scores["languages"]
    found = {name: every[k] for k, name in LANGUAGES.items() if k in every} or {
        "one language": every["all"]
    }
    num, chance = every["all"]["num_pictures"], every["all"].get("recall_chance")
    print(f"\n{f'{num:,} held-back photos':38}" + "".join(f"{name:>24}" for name in found))
    for name, (label, form) in FIGURES.items():
        if name in ("recall", "gain_recall"):
            label += "" if chance is None else f" (chance {chance:.1%})"
        shown = [_show(cell.get(name), form) for cell in found.values()]
        if any(shown):
            print(f"{label:38}" + "".join(f"{text:>24}" for text in shown))
    print(
        f"\nEnglish captions as papers score them (lower case, no punctuation, all references, "
        f"corpus BLEU\nwithout smoothing), found by {NUM_BEAMS} beams; published figures are of "
        "Flickr8k's own test photos:"
    )
    ours = _show(every.get("en", every["all"]).get("papers_bleu"), ".1f")
    for name, figures in ({"this model": ours or "(no English)"} | PUBLISHED).items():
        print(f"  {name:46}{figures}")


def _show(figure: Any, form: str) -> str:
    if isinstance(figure, list):
        return " ".join(format(one, form) for one in figure)
    if isinstance(figure, dict):
        figure = figure["value"]
    return "" if figure is None else format(figure, form)


def write_report(photos: Photos, scores: dict[str, Any]) -> None:
    """`report.png`: curves of the training, and held-back photos with the answers that were
    scored. The photos go into `examples` as well, for the page to show."""
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    from model.vision.pictures import open_image

    installed = {font.name for font in fontManager.ttflist}
    font = next((name for name in FONTS if name in installed), None)
    if font is None:
        print(
            "report.png has no Chinese: no font with Chinese characters is installed, such as the "
            "package fonts-noto-cjk / 未找到中文字体，报告图中不含中文"
        )
    rows = -(-NUM_PHOTOS // COLUMNS)
    figure = Figure(figsize=(14, 4 + 4.4 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=[1] + [1.3] * rows)
    _draw_curves(figure, grid, photos)
    photos.examples.mkdir(exist_ok=True)
    for place, example in enumerate(find_examples(photos, scores)):
        atomic_write(photos.examples / photo_name(place + 1), partial(_write, example.image))
        axes = figure.add_subplot(grid[1 + place // COLUMNS, place % COLUMNS])
        axes.imshow(open_image(example.image))
        axes.axis("off")
        text = _caption(example, with_chinese=font is not None)
        if font is None:
            text = text.encode("ascii", "replace").decode()
        families = [font or "DejaVu Sans", "DejaVu Sans"]
        axes.set_title(text, fontsize=9, loc="left", family=families, parse_math=False)
    atomic_write(photos.out / "report.png", lambda file: figure.savefig(file, format="png", dpi=80))


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def _draw_curves(figure: Any, grid: Any, photos: Photos) -> None:
    half = COLUMNS // 2
    for place, (weight, field, title, unit) in enumerate((
        (CAPTIONS_WEIGHT, "loss", "training loss on the captions", "nats per supervised token"),
        (WEIGHT, "reward", "then: reward of its own answers", "CIDEr-D + 8 BLEU-4"),
    )):  # fmt: skip
        path = photos.out / f"{weight}_{MODEL['hidden_size']}{METRICS_SUFFIX}"
        axes = figure.add_subplot(grid[0, place * half : (place + 1) * half])
        draw_curve(axes, read_metrics(path), field)
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)


def _caption(example: Example, *, with_chinese: bool) -> str:
    """The answers, and below each what a person wrote."""
    widths = {"en": 44, "zh": 22} if with_chinese else {"en": 44}
    lines = []
    for language, width in widths.items():
        for mark, texts in (("", example.answers), ("person: ", example.references)):
            if language in texts:
                lines += textwrap.wrap(
                    mark + texts[language], width, max_lines=MAX_LINES, placeholder=" …"
                )
    return "\n".join(lines)


def find_examples(photos: Photos, scores: dict[str, Any]) -> list[Example]:
    """Photos at equal distances through those that were scored, whatever the answers are like."""
    by_photo: dict[str, dict[str, dict[str, Any]]] = {}
    for row in scores["generated"]:
        by_photo.setdefault(row["images"][0], {})[row["language"]] = row
    names = sorted(by_photo)
    num = min(NUM_PHOTOS, len(names))
    images = open_images(records(photos, "val")[1])
    assert images is not None  # `check_data` saw the file
    examples = []
    for name in (names[i * len(names) // num] for i in range(num)):
        rows = by_photo[name]
        answers = {language: row["answer"] for language, row in rows.items()}
        references = {language: row["references"][0] for language, row in rows.items()}
        examples.append(Example(images.read(name), answers, references))
    return examples
