"""Fetches the published weights of both generations and says whether they are what they should be.

    make check-published
    python dataset/check_published.py
    python dataset/check_published.py sft_vlm_512 sft_vlm3 --save_dir /data/published

For a machine with a hub (`HF_ENDPOINT` and the other mirrors as in download.py). Each weight is
loaded strictly by this project's code. Then it answers built-in questions: a trained one finds the
answers likely, far beyond chance, and a picture's caption likelier with its own picture than with
another's. The exit status is 1 if any weight is not what it should be, or could not be fetched.
"""

import argparse
import itertools
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image, ImageDraw

from dataset.fetching.assets import ASSETS
from dataset.fetching.disk import check_disk, readable
from dataset.fetching.hub import ENDPOINTS, fetch
from dataset.fetching.plan import chosen_assets, make_plan
from dataset.loss_mask import supervised_mask
from model.evaluation.likelihood import LabelledSequence, score_sequences
from model.machine.terminal import one_line
from model.model_minimind import IGNORE_INDEX
from model.options import add_model_arguments
from model.weights.build_model import LoadedModel, load_model

ROOT = Path(__file__).resolve().parents[1]
HUBS = ("huggingface", "modelscope")
PUBLISHED_DIR = ROOT / "out" / "published"
# Nats per token of the built-in answers, in each language. Chance is ln(6400) = 8.8, and the words'
# mere frequencies give about 6.5; a weight with the wrong tokenizer is worse than chance.
MAX_TEXT_LOSS = 5.0
# Share of pairs of pictures whose two captions are likelier on the right pictures than exchanged.
# Chance is a half.
MIN_PAIRS_RIGHT = 0.75
BATCH_SIZE = 8
INTERRUPTED = 130  # exit status after Ctrl-C: 128 plus the signal's number

# By language: a question and its answer.
TEXTS = {
    "English": (
        ("What is the capital of China?", "The capital of China is Beijing."),
        ("How many days are there in a week?", "There are seven days in a week."),
        ("What is water made of?", "Water is made of hydrogen and oxygen."),
        ("Why should we read books?", "Reading books can help us learn new knowledge."),
        ("Hello!", "Hello! How can I help you today?"),
    ),
    "Chinese": (
        ("中国的首都是哪里？", "中国的首都是北京。"),
        ("一个星期有几天？", "一个星期有七天。"),
        ("水是由什么组成的？", "水是由氢和氧两种元素组成的。"),
        ("为什么要多读书？", "多读书可以帮助我们学习新的知识，提高自己的能力。"),
        ("你好！", "你好！请问有什么可以帮助你的吗？"),
    ),
}
QUESTIONS = {"English": "<image>\nDescribe the picture.", "Chinese": "<image>\n描述这张图片。"}
# By language: the caption of each picture of `pictures`, in its order.
CAPTIONS = {
    "English": (
        "A red circle.",
        "A green triangle.",
        "A blue square.",
        "A yellow star.",
        "The sun shines in the blue sky over green grass.",
        "The moon and stars in the dark night sky.",
        "The sun sets over the sea, and the sky is orange.",
        "A black and white chessboard.",
    ),
    "Chinese": (
        "一个红色的圆形。",
        "一个绿色的三角形。",
        "一个蓝色的正方形。",
        "一颗黄色的五角星。",
        "蓝天下，太阳照耀着绿色的草地。",
        "黑暗的夜空中有月亮和星星。",
        "海上日落，天空是橙色的。",
        "黑白相间的棋盘。",
    ),
}


@dataclass(frozen=True)
class Finding:
    """What was measured of a weight.

    Args:
        text_loss: nats per token, by language.
        num_right, num_pairs: of pictures; None where the weight is a language model.
    """

    text_loss: dict[str, float]
    num_right: int | None = None
    num_pairs: int | None = None

    def problems(self) -> list[str]:
        """Why this is no trained model; empty if it may be one."""
        found = [
            f"{language} is hardly likelier than chance"
            for language, loss in self.text_loss.items()
            if not loss <= MAX_TEXT_LOSS
        ]
        if self.num_right is not None and self.num_pairs is not None:
            if self.num_right < MIN_PAIRS_RIGHT * self.num_pairs:
                found.append("captions do not follow the pictures")
        return found

    def __str__(self) -> str:
        losses = ", ".join(f"{name} {loss:.2f}" for name, loss in self.text_loss.items())
        text = f"nats per token: {losses} (at most {MAX_TEXT_LOSS:.2f})"
        if self.num_pairs is None:
            return text
        return (
            f"{text}; pairs of pictures told apart: {self.num_right} of {self.num_pairs} (at least "
            f"{MIN_PAIRS_RIGHT:.0%})"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(
        prog="dataset/check_published.py",
        description="Check the published weights of both generations / 检验两代已发布的权重",
    )
    add = parser.add_argument
    add("weights", nargs="*", help="which, as download.py calls them / 权重名 (default: all)")
    add("--hub", choices=HUBS, default="huggingface", help="where from / 从哪里下载 (%(default)s)")
    save_help = f"cache folder / 缓存目录 (default: {PUBLISHED_DIR.relative_to(ROOT)})"
    add("--save_dir", type=Path, default=PUBLISHED_DIR, help=save_help)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps / 设备 (%(default)s)")
    return parser.parse_args(argv)


def chosen_weights(names: list[str]) -> list[str]:
    """The weights to check, all if none is named; ValueError for what is none."""
    known = [name for name, asset in ASSETS.items() if asset.stage]
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no published weight; choose from {', '.join(known)}")
    return list(dict.fromkeys(names)) or known


def fetch_weight(name: str, *, hub: str, save_dir: Path) -> tuple[Path, Path, Path]:
    """Fetch a weight with its tokenizer and tower, each generation into a folder of its own.

    Returns:
        The weight, the folder of its tokenizer, the folder of its tower.
    Raises:
        ConnectionError, FileNotFoundError, ValueError, OSError: as those of dataset.fetching.
    """
    generation = ASSETS[name].generation
    vision = "vision3" if generation == 3 else "vision"
    root = save_dir / f"generation{generation}"
    wanted = chosen_assets([vision, name], revision=None)
    plan = make_plan(wanted, hub=hub, revision=None, root=root)
    missing = [item for item in plan if item.state != "there"]
    check_disk([(item.path.parent, item.missing_bytes) for item in missing])
    for item in missing:
        print(f"fetching {readable(item.remote.size)} into {item.path}")
        fetch(item.remote, item.path)
    paths = {item.asset: item.path for item in plan}
    tokenizer = next(path for asset, path in paths.items() if asset.startswith("tokenizer"))
    return paths[name], tokenizer.parent, paths[vision].parent


def load(weight: Path, *, tokenizer: Path, tower: Path, device: str) -> LoadedModel:
    """Load a weight as `eval_vlm.py --weight` does."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    paths = {"--weight": weight, "--tokenizer_path": tokenizer, "--vision_model_path": tower}
    flags = [text for flag, path in paths.items() for text in (flag, str(path.resolve()))]
    return load_model(parser.parse_args([*flags, "--device", device, "--dtype", "float32"]))


def pictures() -> list[Image.Image]:
    """The pictures that `CAPTIONS` are of."""
    return [*_shapes(), _meadow(), _night(), _sunset(), _chessboard()]


def _shapes() -> list[Image.Image]:
    """A circle, a triangle, a square and a star, large, on a light ground."""
    images = [Image.new("RGB", (256, 256), (245, 245, 245)) for _ in range(4)]
    circle, triangle, square, star = (ImageDraw.Draw(image) for image in images)
    circle.ellipse((48, 48, 208, 208), fill=(220, 30, 30))
    triangle.polygon(((128, 40), (216, 200), (40, 200)), fill=(30, 160, 50))
    square.rectangle((56, 56, 200, 200), fill=(30, 60, 220))
    tips = [(i * math.pi / 5, 96 if i % 2 == 0 else 40) for i in range(10)]
    corners = [(128 + r * math.sin(angle), 128 - r * math.cos(angle)) for angle, r in tips]
    star.polygon(corners, fill=(250, 205, 30))
    return images


def _meadow() -> Image.Image:
    image = Image.new("RGB", (256, 256), (110, 180, 245))
    draw = ImageDraw.Draw(image)
    draw.ellipse((170, 25, 225, 80), fill=(255, 230, 60))
    draw.rectangle((0, 150, 256, 256), fill=(70, 160, 50))
    for x in range(0, 256, 8):
        draw.line((x, 175 + x % 24, x + 5, 155 + x % 24), fill=(40, 120, 30), width=2)
    return image


def _night() -> Image.Image:
    image = Image.new("RGB", (256, 256), (8, 10, 40))
    draw = ImageDraw.Draw(image)
    draw.ellipse((150, 30, 215, 95), fill=(245, 245, 215))
    places = random.Random(0)
    for _ in range(50):
        x, y = places.randrange(252), places.randrange(252)
        draw.ellipse((x, y, x + 3, y + 3), fill=(255, 255, 255))
    return image


def _sunset() -> Image.Image:
    image = Image.new("RGB", (256, 256))
    draw = ImageDraw.Draw(image)
    for y in range(150):
        draw.line((0, y, 256, y), fill=(200 + y // 3, 70 + y, 40 + y // 4))
    draw.ellipse((98, 105, 158, 165), fill=(255, 220, 90))
    draw.rectangle((0, 150, 256, 256), fill=(30, 40, 90))
    for y in range(156, 256, 12):
        draw.line((110 - y // 6, y, 146 + y // 6, y), fill=(240, 150, 70), width=4)
    return image


def _chessboard() -> Image.Image:
    image = Image.new("RGB", (256, 256), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for row, column in itertools.product(range(8), range(8)):
        if (row + column) % 2:
            draw.rectangle((column * 32, row * 32, column * 32 + 31, row * 32 + 31), fill=0)
    return image


def labelled(
    loaded: LoadedModel, question: str, answer: str, images: Sequence[Image.Image] = ()
) -> LabelledSequence:
    """A question and its answer, with features of the images not yet in it."""
    processor = loaded.processor
    roles = (("user", question), ("assistant", answer))
    messages = [{"role": role, "content": content} for role, content in roles]
    encoded = processor(messages, images)
    ids = encoded["input_ids"]
    is_target = torch.tensor(supervised_mask(ids.tolist(), processor.tokenizer)).bool()
    labels = ids.masked_fill(~is_target, IGNORE_INDEX)
    return LabelledSequence(ids, labels, encoded["image_mask"], None)


def text_loss(loaded: LoadedModel, pairs: Sequence[tuple[str, str]]) -> float:
    """Mean loss per token of the answers, each as one."""
    sequences = [labelled(loaded, question, answer) for question, answer in pairs]
    scored = score_sequences(loaded.model, sequences, batch_size=BATCH_SIZE)
    return sum(answers[0].loss for answers in scored) / len(scored)


@torch.inference_mode()
def count_pairs(loaded: LoadedModel) -> tuple[int, int]:
    """How many pairs of pictures are told apart, in each language, and how many there are.

    A pair is told apart if its captions are likelier on their own pictures than exchanged: what
    makes a caption or a picture likely or unlikely as such cancels out.
    """
    images = pictures()
    model, device = loaded.model, loaded.model.device
    pixels = loaded.processor.pixel_values(images).to(device, model.dtype)
    features = model.encode_images(pixels)[:, None]  # (I, 1, P, D)
    num_right = num_pairs = 0
    for language, captions in CAPTIONS.items():
        plain = [
            labelled(loaded, QUESTIONS[language], caption, [image])
            for caption, image in zip(captions, images, strict=True)
        ]
        sequences = [
            LabelledSequence(s.input_ids, s.labels, s.image_mask, own)
            for s, own in itertools.product(plain, features)
        ]
        scored = score_sequences(model, sequences, batch_size=BATCH_SIZE)
        loss = torch.tensor([answers[0].loss for answers in scored]).view(len(images), len(images))
        for i, j in itertools.combinations(range(len(images)), 2):
            num_right += bool(loss[i, i] + loss[j, j] < loss[i, j] + loss[j, i])
            num_pairs += 1
    return num_right, num_pairs


def examine(loaded: LoadedModel, *, can_see: bool) -> Finding:
    """Score the built-in texts, and the pictures if the weight should see."""
    losses = {language: text_loss(loaded, pairs) for language, pairs in TEXTS.items()}
    return Finding(losses, *count_pairs(loaded)) if can_see else Finding(losses)


def check_weight(name: str, args: argparse.Namespace) -> bool:
    """Fetch, load and examine one weight and print a line about it; whether it is right.

    Raises:
        ConnectionError: the hub cannot be reached.
    """
    asset = ASSETS[name]
    about = f"{name} (generation {asset.generation})"
    try:
        weight, tokenizer, tower = fetch_weight(name, hub=args.hub, save_dir=args.save_dir)
        loaded = load(weight, tokenizer=tokenizer, tower=tower, device=args.device)
        if asset.stage != "llm" and not loaded.can_see:
            raise ValueError(f"{weight} has no projection, so it cannot see")
        finding = examine(loaded, can_see=asset.stage != "llm")
    except ConnectionError:
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        print(f"FAILED {about}: {one_line(str(error))}", flush=True)
        return False
    problems = finding.problems()
    verdict = f"NOT what it should be ({'; '.join(problems)})" if problems else "as it should be"
    print(f"{'FAILED' if problems else 'ok    '} {about}: {verdict}; {finding}", flush=True)
    return not problems


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a weight is not what it should be, or there is no hub."""
    args = parse_args(argv)
    try:
        names = chosen_weights(args.weights)
        print(f"{len(names)} weights, kept in {args.save_dir}", flush=True)
        are_right = [check_weight(name, args) for name in names]
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here / 已中断", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        way_out = ""
        if isinstance(error, ConnectionError):
            mirror, _ = ENDPOINTS[args.hub]
            way_out = f"; this needs a hub: name a mirror by {mirror}, or take another --hub"
        print(f"error: {one_line(str(error))}{way_out}", file=sys.stderr)
        return 1
    print(f"{sum(are_right)} of {len(names)} are as they should be", flush=True)
    return 0 if all(are_right) else 1


if __name__ == "__main__":
    sys.exit(main())
