"""Owns how a scene of the sample world becomes pixels, and the named evaluation pictures."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from dataset.synthetic.scenes import GROUNDS, PLACES, RGB, Item, Scene, sample_scene

OVERSAMPLING = 2  # drawn so many times larger, then averaged down, for smooth edges
MIN_IMAGE_SIZE = 32
CHARACTER_HALF_HEIGHT = 0.13  # of the image's side
SHADE = 0.22  # how far a texture's second tone is from the first

# Strokes in a box from (-1, -1) to (1, 1): a letter looks the same whatever fonts are installed.
STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "2": [[(-0.6, -0.6), (-0.3, -1), (0.3, -1), (0.6, -0.6), (0.6, -0.3), (-0.6, 1), (0.6, 1)]],
    "4": [[(0.3, 1), (0.3, -1), (-0.7, 0.4), (0.7, 0.4)]],
    "7": [[(-0.6, -1), (0.6, -1), (-0.2, 1)]],
    "A": [[(-0.7, 1), (0, -1), (0.7, 1)], [(-0.4, 0.3), (0.4, 0.3)]],
    "E": [[(0.6, -1), (-0.6, -1), (-0.6, 1), (0.6, 1)], [(-0.6, 0), (0.4, 0)]],
    "H": [[(-0.6, -1), (-0.6, 1)], [(0.6, -1), (0.6, 1)], [(-0.6, 0), (0.6, 0)]],
    "S": [
        [(0.6, -0.7), (0.3, -1), (-0.3, -1), (-0.6, -0.7), (-0.6, -0.3), (-0.3, 0), (0.3, 0)]
        + [(0.6, 0.3), (0.6, 0.7), (0.3, 1), (-0.3, 1), (-0.6, 0.7)]
    ],
    "X": [[(-0.7, -1), (0.7, 1)], [(0.7, -1), (-0.7, 1)]],
}
EVAL_IMAGE_SIZE = 224
# Colour, shape, number of shapes, letter or digit, and the file's English and Chinese name.
EVAL_IMAGES = (
    ("red", "circle", 1, None, "红色圆形-red-circle"),
    ("blue", "square", 1, None, "蓝色正方形-blue-square"),
    ("green", "triangle", 1, None, "绿色三角形-green-triangle"),
    ("yellow", "star", 1, None, "黄色五角星-yellow-star"),
    ("purple", "heart", 2, None, "紫色心形和另一个图形-purple-heart-and-another"),
    ("orange", "circle", 3, None, "橙色圆形等三个图形-orange-circle-and-two-more"),
    ("white", "cross", 4, None, "白色十字形等四个图形-white-cross-and-three-more"),
    ("red", "triangle", 1, "A", "红色三角形和字母A-red-triangle-and-letter-A"),
)
EVAL_MULTI_IMAGES = {  # sub-folder -> the pictures in it
    "圆形和正方形-circle-and-square": ("红色圆形-red-circle", "蓝色正方形-blue-square"),
    "两个三角形-two-triangles": (
        "绿色三角形-green-triangle",
        "红色三角形和字母A-red-triangle-and-letter-A",
    ),
    "哪张更多-which-has-more": (
        "紫色心形和另一个图形-purple-heart-and-another",
        "白色十字形等四个图形-white-cross-and-three-more",
    ),
}


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape about the origin, radius about 1, y down."""
    if shape == "circle":
        return _around(40, lambda i: 1.0)
    if shape == "square":
        return ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
    if shape == "triangle":
        return ((0.0, -1.0), (0.95, 0.75), (-0.95, 0.75))
    if shape == "star":
        return _around(10, lambda i: 0.42 if i % 2 else 1.05)
    if shape == "cross":
        arm = 0.33
        corner = [(-arm, -1), (arm, -1), (arm, -arm)]
        return tuple(
            (x * c - y * s, x * s + y * c)
            for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
            for x, y in corner
        )
    if shape == "heart":
        turns = [2 * math.pi * i / 40 for i in range(40)]
        return tuple((math.sin(t) ** 3, -_heart_height(t) / 16) for t in turns)
    raise ValueError(f"shape {shape!r} is unknown")


def _heart_height(t: float) -> float:
    """Source: https://mathworld.wolfram.com/HeartCurve.html (its sixth curve)."""
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)


def _around(num_corners: int, radius: Callable[[int], float]) -> tuple[tuple[float, float], ...]:
    angles = [2 * math.pi * i / num_corners for i in range(num_corners)]
    return tuple((radius(i) * math.sin(a), -radius(i) * math.cos(a)) for i, a in enumerate(angles))


def draw_scene(scene: Scene, *, image_size: int = 96) -> Image.Image:
    """The picture of a scene: 8-bit RGB, `image_size` pixels square.

    Raises:
        ValueError: too small to distinguish the shapes.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image size {image_size} is too small; use {MIN_IMAGE_SIZE} or more")
    side = image_size * OVERSAMPLING
    image = _ground(scene, side)
    for item in scene.items:
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).polygon(_corners(item, side), fill=255)
        box = mask.getbbox()
        assert box is not None, "a shape of no pixel"
        image.paste(_texture(item, box, side), box[:2], mask.crop(box))
    if scene.character is not None:
        _draw_character(image, scene)
    return image.reduce(OVERSAMPLING)


def _corners(item: Item, side: int) -> list[tuple[float, float]]:
    cos, sin = math.cos(math.radians(item.angle)), math.sin(math.radians(item.angle))
    turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in outline(item.shape)]
    return [
        (side * (item.x + item.radius * x), side * (item.y + item.radius * y)) for x, y in turned
    ]


def _shade(rgb: RGB, amount: float) -> RGB:
    """A darker tone of a colour; of a dark one a lighter tone."""
    towards = 255 if max(rgb) < 80 else 0
    red, green, blue = (round(channel + (towards - channel) * amount) for channel in rgb)
    return red, green, blue


def _texture(item: Item, box: tuple[int, int, int, int], side: int) -> Image.Image:
    """The filling of a shape's bounding box, in two tones of its colour."""
    width, height = box[2] - box[0], box[3] - box[1]
    tile = Image.new("RGB", (width, height), item.rgb)
    draw, second = ImageDraw.Draw(tile), _shade(item.rgb, SHADE)
    step = max(4, side // 24)
    if item.texture == "striped":
        for x in range(-height, width, 2 * step):
            draw.line([(x, height), (x + height, 0)], fill=second, width=max(1, step // 2))
    elif item.texture == "dotted":
        for y in range(0, height, 2 * step):
            for x in range(0, width, 2 * step):
                draw.ellipse([x, y, x + step, y + step], fill=second)
    elif item.texture == "checked":
        for row, y in enumerate(range(0, height, step)):
            for x in range(step * (row % 2), width, 2 * step):
                draw.rectangle([x, y, x + step - 1, y + step - 1], fill=second)
    return tile


def _ground(scene: Scene, side: int) -> Image.Image:
    """The background: a muted tone with a faint texture."""
    rgb, rng = GROUNDS[scene.ground], Random(scene.seed)
    red, green, blue = (channel + rng.randint(-8, 8) for channel in rgb)
    base = red, green, blue
    if scene.ground_texture == "gradient":
        other = Image.new("RGB", (side, side), _shade(base, 0.18))
        ramp = Image.linear_gradient("L").rotate(90 * rng.randrange(4)).resize((side, side))
        return Image.composite(other, Image.new("RGB", (side, side), base), ramp)
    image = Image.new("RGB", (side, side), base)
    draw = ImageDraw.Draw(image)
    if scene.ground_texture == "blotches":
        for _ in range(14):
            x, y = rng.randrange(side), rng.randrange(side)
            radius = rng.randint(4, 18) * side // 192
            tone = _shade(base, rng.uniform(0.03, 0.1))
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=tone)
    elif scene.ground_texture == "lines":
        step, is_upright = side // rng.randint(6, 12), rng.random() < 0.5
        for at in range(rng.randrange(step), side, step):
            line = [(at, 0), (at, side)] if is_upright else [(0, at), (side, at)]
            draw.line(line, fill=_shade(base, 0.08), width=max(1, side // 64))
    return image


def _draw_character(image: Image.Image, scene: Scene) -> None:
    """The letter or digit, light on a dark ground and dark on a light one."""
    assert scene.character is not None and scene.character_place is not None
    side = image.width
    column, row = PLACES[scene.character_place]
    rng = Random(scene.seed + 1)
    x, y = (0.25 + 0.5 * at + rng.uniform(-0.03, 0.03) for at in (column, row))
    size = CHARACTER_HALF_HEIGHT * rng.uniform(0.85, 1.15)
    ink = (245, 245, 245) if sum(GROUNDS[scene.ground]) < 360 else (25, 25, 25)
    for stroke in STROKES[scene.character]:
        points = [(side * (x + size * 0.8 * u), side * (y + size * v)) for u, v in stroke]
        ImageDraw.Draw(image).line(points, fill=ink, width=side // 28, joint="curve")


def write_eval_images(out: Path) -> list[Path]:
    """Write the pictures of `dataset/eval_images/`: held-out scenes, named in both languages."""
    out.mkdir(parents=True, exist_ok=True)
    return [_save_eval_image(name, out / f"{name}.png") for *_, name in EVAL_IMAGES]


def write_eval_multi_images(out: Path) -> list[Path]:
    """Write the samples of `dataset/eval_multi_images/`: two of those pictures in a folder each."""
    paths = []
    for folder, names in EVAL_MULTI_IMAGES.items():
        (out / folder).mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names, 1):
            paths.append(_save_eval_image(name, out / folder / f"{number}-{name}.png"))
    return paths


def _save_eval_image(name: str, path: Path) -> Path:
    wanted = {spec[-1]: spec for spec in EVAL_IMAGES}[name]
    colour, shape, num_items, character, _ = wanted
    rng = Random(name)
    while True:
        scene = sample_scene(rng, split="heldout", num_items=num_items, character_share=0.5)
        first = scene.items[0]
        if (first.colour, first.shape, scene.character) == (colour, shape, character):
            break
    draw_scene(scene, image_size=EVAL_IMAGE_SIZE).save(path, optimize=True)
    return path
