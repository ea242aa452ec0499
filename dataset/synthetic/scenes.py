"""Owns the sample world: what a scene is made of, and which scenes are held out.

A scene holds one to four coloured shapes, at most one in each quadrant, and sometimes a letter or
digit in a free quadrant. Lengths are shares of the image's side; x runs right and y runs down.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from random import Random

RGB = tuple[int, int, int]  # 0 to 255 each
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "purple": (128, 40, 185),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
PLACES = {  # the corner of each quadrant, in quadrants
    "top left": (0, 0),
    "top right": (1, 0),
    "bottom left": (0, 1),
    "bottom right": (1, 1),
}
SIZES = {"small": 0.13, "medium": 0.17, "large": 0.205}  # radius
TEXTURES = ("plain", "striped", "dotted", "checked")
GROUNDS = {
    "grey": (140, 140, 140),
    "silver": (205, 205, 210),
    "beige": (226, 208, 178),
    "sky": (176, 208, 232),
    "mint": (186, 220, 192),
    "slate": (74, 84, 100),
    "cocoa": (92, 70, 60),
}
GROUND_TEXTURES = ("plain", "gradient", "blotches", "lines")
CHARACTERS = ("2", "4", "7", "A", "E", "H", "S", "X")
SPLITS = ("train", "heldout")

# One shape of every colour never occurs in training, neither in pictures nor in texts.
HELDOUT_PAIRS = (
    ("red", "star"),
    ("orange", "cross"),
    ("yellow", "heart"),
    ("green", "circle"),
    ("blue", "triangle"),
    ("purple", "square"),
    ("white", "star"),
    ("black", "heart"),
)
TRAIN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELDOUT_PAIRS)
HELDOUT_SHARE = 8  # one of so many scenes belongs to the held-out set
CENTRE_JITTER = 0.02
MAX_ANGLE_DEGREES = 12.0
COLOUR_JITTER = 10  # of 255, per channel
MIN_CONTRAST = 95.0  # distance in RGB between a shape and the ground
MIN_NAMELESS = 50.0  # distance in RGB between a colour without a name and every named one
LEFT_OUT = ""  # in place of a colour or shape that the text shall not name


@dataclass(frozen=True)
class Item:
    """One shape of a scene."""

    shape: str
    colour: str
    place: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float  # degrees
    rgb: RGB


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows; `seed` decides the fine grain of the ground."""

    items: tuple[Item, ...]
    ground: str
    ground_texture: str
    character: str | None
    character_place: str | None
    seed: int


def scene_key(scene: Scene) -> str:
    """What a scene shows, as text: each shape with its place, size and texture, and the ground."""
    items = sorted(f"{i.colour} {i.shape} {i.place} {i.size} {i.texture}" for i in scene.items)
    character = f"{scene.character} {scene.character_place}"
    return "; ".join([*items, character, f"{scene.ground} {scene.ground_texture}"])


def is_heldout_scene(scene: Scene) -> bool:
    """Whether a scene belongs to the held-out set: by a hash of its key, whatever the seed, and
    always if it holds a held-out pair. So no held-out scene occurs in training under any seed."""
    if any((item.colour, item.shape) in HELDOUT_PAIRS for item in scene.items):
        return True
    return hashlib.sha256(scene_key(scene).encode()).digest()[0] % HELDOUT_SHARE == 0


def sample_scene(
    rng: Random,
    *,
    split: str = "train",
    is_combination: bool = False,
    character_share: float = 0.3,
    num_items: int | None = None,
) -> Scene:
    """A random scene of a split.

    Args:
        rng: decides everything; the same state gives the same scene.
        split: "train" or "heldout"; no scene belongs to both.
        is_combination: exactly one shape is of a held-out pair (held-out split only).
        character_share: chance that a letter or digit stands in a free quadrant.
        num_items: shapes, 1 to 4; None draws it, each number equally often.
    Raises:
        ValueError: an unknown split, or a held-out combination asked of the training split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
    if is_combination and split != "heldout":
        raise ValueError("held-out combinations belong to the split 'heldout' only")
    count = num_items or rng.randint(1, 4)
    while True:
        pairs = [rng.choice(TRAIN_PAIRS) for _ in range(count)]
        if is_combination:
            pairs[0] = rng.choice(HELDOUT_PAIRS)
        scene = _place_items(rng, pairs, character_share)
        if is_heldout_scene(scene) == (split == "heldout"):
            return scene


def _place_items(rng: Random, pairs: list[tuple[str, str]], character_share: float) -> Scene:
    places = rng.sample(list(PLACES), 4)
    items = tuple(
        _make_item(rng, colour, shape, place)
        for (colour, shape), place in zip(pairs, places, strict=False)
    )
    has_character = len(items) < 4 and rng.random() < character_share
    grounds = [
        name
        for name, rgb in GROUNDS.items()
        if all(math.dist(rgb, COLOURS[item.colour]) >= MIN_CONTRAST for item in items)
    ]
    return Scene(
        items=items,
        ground=rng.choice(grounds),
        ground_texture=rng.choice(GROUND_TEXTURES),
        character=rng.choice(CHARACTERS) if has_character else None,
        character_place=places[len(items)] if has_character else None,
        seed=rng.getrandbits(32),
    )


def _make_item(rng: Random, colour: str, shape: str, place: str) -> Item:
    column, row = PLACES[place]
    size = rng.choice(list(SIZES))
    return Item(
        shape=shape,
        colour=colour,
        place=place,
        size=size,
        texture=rng.choice(TEXTURES),
        x=0.25 + 0.5 * column + rng.uniform(-CENTRE_JITTER, CENTRE_JITTER),
        y=0.25 + 0.5 * row + rng.uniform(-CENTRE_JITTER, CENTRE_JITTER),
        radius=SIZES[size] * rng.uniform(0.93, 1.02),
        angle=rng.uniform(-MAX_ANGLE_DEGREES, MAX_ANGLE_DEGREES),
        rgb=_jitter(rng, COLOURS[colour]),
    )


def _jitter(rng: Random, rgb: RGB) -> RGB:
    red, green, blue = (
        min(255, max(0, channel + rng.randint(-COLOUR_JITTER, COLOUR_JITTER))) for channel in rgb
    )
    return red, green, blue


def recolour(scene: Scene, rng: Random) -> Scene:
    """The scene with each shape in a random colour that no word of the sample world names."""
    ground = GROUNDS[scene.ground]

    def is_fit(rgb: RGB) -> bool:
        is_nameless = all(math.dist(rgb, named) >= MIN_NAMELESS for named in COLOURS.values())
        return is_nameless and math.dist(rgb, ground) >= MIN_CONTRAST

    items = []
    for item in scene.items:
        while not is_fit(rgb := (rng.randrange(256), rng.randrange(256), rng.randrange(256))):
            pass
        items.append(replace(item, colour=LEFT_OUT, rgb=rgb))
    return replace(scene, items=tuple(items))


def hide_shapes(scene: Scene) -> Scene:
    """The scene with its shapes left out of the text; drawing it needs the original."""
    return replace(scene, items=tuple(replace(item, shape=LEFT_OUT) for item in scene.items))
