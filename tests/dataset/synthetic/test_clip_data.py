"""The tiny tower's data: were it wrong, the tower would learn which shape comes in which colour."""

import math
from random import Random

import pytest
import torch

from dataset.synthetic.clip_data import UNNAMED, WORDS, Scenes, name_patches
from dataset.synthetic.scenes import COLOURS, GROUNDS, SHAPES, recolour, sample_scene
from model.vlm_processor import load_tokenizer


def test_scenes_are_of_the_training_split_and_repeatable():
    tokenizer = load_tokenizer()
    scenes = Scenes(10, seed=3, tokenizer=tokenizer)
    for first, again in zip(scenes[0], scenes[0], strict=True):
        assert torch.equal(first, again)
    picture, ids, names = scenes[9]
    assert picture.shape == (3, 96, 96) and names.shape == (len(WORDS), 196)
    assert tokenizer.decode(ids).endswith("<|endoftext|>")  # where CLIP reads the text
    assert not torch.equal(picture, scenes[0][0])
    with pytest.raises(IndexError):
        scenes[10]


def test_a_scene_teaches_colours_or_shapes_never_which_come_together():
    tokenizer = load_tokenizer()
    lists, said = list(WORDS), []
    for _, ids, names in Scenes(20, seed=1, tokenizer=tokenizer):
        kinds = {k for k in ("colour", "shape") if (names[lists.index(k)] != UNNAMED).any()}
        text = tokenizer.decode(ids)
        named = {
            kind
            for kind, words in (("colour", COLOURS), ("shape", SHAPES))
            if any(word in text for word in words)
        }
        assert kinds == named and len(kinds) == 1
        said += kinds
    assert set(said) == {"colour", "shape"}


def test_shapes_are_taught_in_colours_without_a_name():
    rng = Random(0)
    for _ in range(100):
        scene = sample_scene(rng)
        shown = recolour(scene, rng)
        assert [i.shape for i in shown.items] == [i.shape for i in scene.items]
        for item in shown.items:
            assert all(math.dist(item.rgb, named) >= 50 for named in COLOURS.values())
            assert math.dist(item.rgb, GROUNDS[scene.ground]) >= 95


def test_patches_are_named_by_what_they_show():
    lists = list(WORDS)
    for seed in range(50):
        scene = sample_scene(Random(seed), character_share=0.5)
        names = name_patches(scene).reshape(len(WORDS), 14, 14)
        for item in scene.items:
            at = (int(item.y * 14), int(item.x * 14))  # the patch at the shape's middle
            for kind in ("colour", "shape", "place", "size", "texture"):
                said = WORDS[kind][names[(lists.index(kind), *at)]]
                assert said == getattr(item, kind)
            assert names[(lists.index("count"), *at)] == UNNAMED
        assert WORDS["count"][names[lists.index("count"), 0, 0]].startswith(str(len(scene.items)))
        assert names[lists.index("shape"), 0, 0] == UNNAMED
        has_character = (names[lists.index("character")] != UNNAMED).any()
        assert has_character == (scene.character is not None)
