"""Owns the training data of the tiny CLIP: pictures, captions, and a word of each list per patch.

Shapes: B pictures, T tokens, P patches, `NUM_ROWS` in a column and in a row.
"""

from collections.abc import Sequence
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dataset.synthetic.drawing import draw_scene
from dataset.synthetic.scenes import (
    CHARACTERS,
    COLOURS,
    LEFT_OUT,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    hide_shapes,
    recolour,
    sample_scene,
)
from dataset.synthetic.text import scene_in_words

NUM_ROWS, DRAWN_SIDE = 14, 96  # of patches; of a picture, in pixels
UNNAMED = -1  # label of a patch that no word of a list fits
COLOURS_EVERY = 4  # one picture of so many teaches colours, which take fewer steps; the rest shapes

# What a patch can show: of each list one word or none.
WORDS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": tuple(PLACES),
    "size": tuple(SIZES),
    "texture": TEXTURES,
    "character": tuple(f"letter {c}" for c in CHARACTERS),
    "count": ("1 shape", "2 shapes", "3 shapes", "4 shapes"),  # of the whole picture: the ground
}


def name_patches(scene: Scene) -> npt.NDArray[np.int64]:
    """Which word of each list fits each patch: (word lists, P) int64, `UNNAMED` for none.

    Patches within a shape's radius get the words of the shape, those of a character its name, and
    those of the ground the number of shapes.
    """
    centres = (np.arange(NUM_ROWS) + 0.5) / NUM_ROWS
    x, y = np.meshgrid(centres, centres)
    names = dict(zip(WORDS, np.full((len(WORDS), NUM_ROWS, NUM_ROWS), UNNAMED), strict=True))
    names["count"][:] = len(scene.items) - 1
    for item in scene.items:
        is_covered = np.hypot(x - item.x, y - item.y) <= item.radius
        names["count"][is_covered] = UNNAMED
        for kind in ("colour", "shape", "place", "size", "texture"):
            word = getattr(item, kind)
            names[kind][is_covered] = UNNAMED if word == LEFT_OUT else WORDS[kind].index(word)
    if scene.character is not None and scene.character_place is not None:
        column, row = PLACES[scene.character_place]
        is_covered = (abs(x - 0.25 - 0.5 * column) < 0.1) & (abs(y - 0.25 - 0.5 * row) < 0.13)
        names["count"][is_covered] = UNNAMED
        names["character"][is_covered] = CHARACTERS.index(scene.character)
        names["place"][is_covered] = WORDS["place"].index(scene.character_place)
    return np.stack(list(names.values())).reshape(len(WORDS), -1)


class Scenes(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Scenes of the training split; each teaches either the colours or the shapes in it."""

    def __init__(self, num_scenes: int, *, seed: int, tokenizer: PreTrainedTokenizerBase):
        self.num_scenes, self.seed, self.tokenizer = num_scenes, seed, tokenizer

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Picture (3, side, side) uint8, caption ids (T,), names of its patches."""
        if not 0 <= index < self.num_scenes:
            raise IndexError(index)
        rng = Random(f"{self.seed} {index}")
        shown = sample_scene(rng)
        if index % COLOURS_EVERY:
            shown = named = recolour(shown, rng)
        else:
            named = hide_shapes(shown)
        ids = encode(self.tokenizer, scene_in_words(named, rng, style="table"))
        return draw(shown), ids, torch.from_numpy(name_patches(named))


def draw(scene: Scene) -> Tensor:
    """The picture of a scene: (3, side, side) uint8."""
    picture = np.asarray(draw_scene(scene, image_size=DRAWN_SIDE))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids (T,), the last of them the padding token, whose state CLIP takes as that of the
    whole text. The tokenizer's end token has id 2, which transformers' CLIP handles as a special
    case for old checkpoints, so it cannot be used."""
    return torch.tensor([*tokenizer.encode(text), tokenizer.pad_token_id])


def pad_ids(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, T)."""
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(t) for t in texts])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def collate(scenes: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Pictures (B, 3, side, side) uint8, ids and mask (B, T), names (B, word lists, P)."""
    pictures, texts, names = zip(*scenes, strict=True)
    ids, mask = pad_ids(list(texts))
    return {
        "pictures": torch.stack(pictures),
        "ids": ids,
        "mask": mask,
        "names": torch.stack(names),
    }


def encode_words(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor, list[int]]:
    """All words of all lists: ids and mask (words, T), and the number of words in each list."""
    texts = [encode(tokenizer, word) for words in WORDS.values() for word in words]
    return *pad_ids(texts), [len(words) for words in WORDS.values()]
