"""If this fails, the sample world has wrong or ambiguous answers, or held-out scenes occur in its
training data, so that the demo's scores mean nothing.
"""

import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from PIL import Image, ImageChops
from support.scripts import ROOT

from dataset.records.reader import open_records
from dataset.synthetic import sample_data as synthetic
from dataset.synthetic.drawing import draw_scene
from dataset.synthetic.scenes import (
    CHARACTERS,
    COLOURS,
    HELDOUT_PAIRS,
    PLACES,
    SHAPES,
    TEXTURES,
    sample_scene,
    scene_key,
)
from dataset.synthetic.text import (
    CHANCE,
    STYLES,
    pair_turns,
    scene_in_words,
    scene_turns,
    word,
)

LANGUAGES = ("en", "zh")


def tree_bytes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns_of(record: dict) -> list[tuple[str, str]]:
    contents = [message["content"] for message in record["conversations"]]
    return list(zip(contents[::2], contents[1::2], strict=True))


def scenes(num: int, **options):
    return [sample_scene(Random(i), **options) for i in range(num)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A training and a held-out set."""
    folder = tmp_path_factory.mktemp("world")
    for split, num in (("train", 300), ("heldout", 200)):
        synthetic.write_dataset(folder, num_images=num, split=split, num_pairs=60, num_text=200)
    return folder


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_records_read_as_the_published_formats(world, split):
    for kind, num_images in (("", 1), ("_captions", 1), ("_pairs", 2), ("_text", 0)):
        records = open_records(world / f"{split}{kind}.jsonl", world / f"{split}_images")
        for index in range(len(records)):
            record = records[index]  # raises on any fault, a missing picture included
            assert len(record.images) == num_images
            assert [m["role"] for m in record.messages[:2]] == ["user", "assistant"]
    image = Image.open(world / f"{split}_images" / f"{split}_000000.png")
    assert image.size == (96, 96) and image.mode == "RGB"


def test_same_seed_gives_the_same_bytes_in_another_process(tmp_path):
    command = [sys.executable, "-m", "dataset.synthetic", "--num_images", "12", "--num_text", "9"]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        subprocess.run(
            [*command, "--out", tmp_path / name, "--seed", str(seed)],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
    first, again, other = (tree_bytes(tmp_path / name) for name in "abc")
    assert len(first) == 12 + 4
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_a_larger_set_begins_with_the_smaller_one(tmp_path):
    for name, num in (("small", 8), ("large", 16)):
        synthetic.write_dataset(tmp_path / name, num_images=num)
    small, large = tree_bytes(tmp_path / "small"), tree_bytes(tmp_path / "large")
    images = {name for name in small if name.endswith(".png")}
    assert len(images) == 8
    assert all(small[name] == large[name] for name in images)
    assert (
        read_jsonl(tmp_path / "small/train.jsonl")
        == (read_jsonl(tmp_path / "large/train.jsonl")[:8])
    )


def test_no_scene_is_in_both_splits():
    train = {scene_key(s) for s in scenes(3000, num_items=1, character_share=0)}
    heldout = {scene_key(s) for s in scenes(1500, num_items=1, character_share=0, split="heldout")}
    assert len(heldout) > 800
    assert not train & heldout
    assert len(train & {scene_key(s) for s in scenes(4000, num_items=1)}) > 100  # keys do collide


def test_heldout_pairs_never_occur_in_training_pictures():
    seen = {(item.colour, item.shape) for scene in scenes(2000) for item in scene.items}
    everything = {(colour, shape) for colour in COLOURS for shape in SHAPES}
    assert seen == everything - set(HELDOUT_PAIRS)
    assert {colour for colour, _ in HELDOUT_PAIRS} == set(COLOURS)


def test_heldout_pairs_never_occur_in_training_text(world):
    texts = list(synthetic.sample_text(1500))
    for kind in ("", "_captions", "_pairs", "_text"):
        texts += (world / f"train{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    for record in synthetic.text_conversations(1500, seed=5, styles=("pieces",)):
        texts.append(record["conversations"][0]["content"])
    together = "\n".join(texts)
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    found = {
        (colour, shape)
        for colour, shape in pairs
        if f"{colour} {shape}" in together or word(colour, "zh") + word(shape, "zh") in together
    }
    assert found == set(pairs) - set(HELDOUT_PAIRS)


def test_combination_scenes_hold_exactly_one_heldout_pair():
    seen = Counter()
    for scene in scenes(400, split="heldout", is_combination=True):
        pairs = [(item.colour, item.shape) for item in scene.items]
        assert [pair in HELDOUT_PAIRS for pair in pairs] == [True] + [False] * (len(pairs) - 1)
        seen[pairs[0]] += 1
    assert set(seen) == set(HELDOUT_PAIRS)
    with pytest.raises(ValueError, match="heldout"):
        sample_scene(Random(0), is_combination=True)


def test_heldout_records_name_the_type_of_every_turn(world):
    counts, combination_records = Counter(), 0
    for kind in ("", "_pairs", "_text"):
        for record in read_jsonl(world / f"heldout{kind}.jsonl"):
            assert len(record["types"]) == len(turns_of(record))
            counts.update(record["types"])
            combination_records += "combination" in record["types"]
    assert set(counts) == set(CHANCE)
    assert combination_records == 200 // synthetic.COMBINATION_EVERY
    assert counts["combination"] == 2 * combination_records
    assert "types" not in read_jsonl(world / "train.jsonl")[0]


def solve(scene, question: str, language: str, type_: str) -> set[str]:
    """Every answer that fits a question, found from its words alone."""
    named = [
        item
        for item in scene.items
        if all(
            getattr(item, attribute) == name
            for attribute, names in (("colour", COLOURS), ("shape", SHAPES), ("place", PLACES))
            for name in names
            if word(name, language) in question
        )
    ]
    if type_ == "count":
        return {str(len(scene.items))}
    if type_ == "character":
        return {scene.character}
    attribute = {"position": "place"}.get(type_, type_)
    return {word(getattr(item, attribute), language) for item in named}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_question_has_one_answer_and_it_is_the_recorded_one(language):
    counts = Counter()
    for seed, scene in enumerate(scenes(1500)):
        for turn in scene_turns(scene, Random(seed), language=language):
            assert solve(scene, turn.question, language, turn.type) == {turn.answer}, turn
            counts[turn.type] += 1
    assert set(counts) == {"count", "colour", "shape", "position", "character"}
    assert min(counts.values()) > 200


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_answer_stands_in_a_question_of_its_record(language):
    for seed, scene in enumerate(scenes(1500)):
        turns = scene_turns(scene, Random(seed), language=language)
        questions = "\n".join(turn.question for turn in turns)
        types = [turn.type for turn in turns]
        assert types.count("position") <= 1
        assert "count" not in types[1:]
        for turn in turns:
            if turn.type in ("colour", "shape", "position"):
                assert turn.answer not in questions, turns


@pytest.mark.parametrize("language", LANGUAGES)
def test_pair_questions_have_the_recorded_answer_and_are_balanced(language):
    first_is = Counter()
    drawn = scenes(3000)
    for seed, (one, two) in enumerate(zip(drawn[::2], drawn[1::2], strict=True)):
        more = {len(one.items) > len(two.items)}
        for turn in pair_turns(one, two, Random(seed), language=language):
            assert turn.answer in (word("the first", language), word("the second", language))
            is_first = turn.answer == word("the first", language)
            fits = [solve_pair(scene, turn.question, language) for scene in (one, two)]
            if fits == [None, None]:
                assert more == {is_first}
                kind = "more"
            else:
                assert fits == [is_first, not is_first]
                kind = f"named, first has more: {more}"  # the number of shapes must be no hint
            first_is[kind, is_first] += 1
    for kind in {kind for kind, _ in first_is}:
        first, second = first_is[kind, True], first_is[kind, False]
        assert abs(first - second) < 0.15 * (first + second), (kind, first, second)


def solve_pair(scene, question: str, language: str) -> bool | None:
    """Whether a picture has what the question names; None if it names nothing."""
    for attribute, names in (("shape", SHAPES), ("colour", COLOURS)):
        for name in names:
            if word(name, language) in question:
                return any(getattr(item, attribute) == name for item in scene.items)
    return None


@pytest.mark.slow
def test_chance_is_what_the_best_blind_guess_scores(tmp_path):
    """The commonest training answer to the same words is right about as often as chance."""
    synthetic.write_dataset(tmp_path, num_images=3000, split="train", seed=1, image_size=32)
    synthetic.write_dataset(
        tmp_path, num_images=3000, split="heldout", seed=1, image_size=32, num_pairs=1000
    )
    seen = defaultdict(Counter)
    for record in read_jsonl(tmp_path / "train.jsonl"):
        for question, answer in turns_of(record):
            seen[question.removeprefix("<image>\n")][answer] += 1
    right, asked = Counter(), Counter()
    for record in read_jsonl(tmp_path / "heldout.jsonl"):
        for (question, answer), type_ in zip(turns_of(record), record["types"], strict=True):
            guesses = seen[question.removeprefix("<image>\n")].most_common(1)
            right[type_] += bool(guesses) and guesses[0][0] == answer
            asked[type_] += 1
    for type_, num in asked.items():
        assert num >= 500 or type_ == "character"
        assert right[type_] / num < CHANCE[type_] + 0.05, type_


def test_pictures_show_what_the_scene_says():
    """Changing one thing of a scene changes its picture where that thing stands."""
    for seed, scene in enumerate(scenes(40, num_items=3, character_share=1)):
        picture = draw_scene(scene)
        item = scene.items[seed % 3]
        quadrant = tuple(round(48 * (at + edge)) for edge in (0, 1) for at in PLACES[item.place])
        for change in (
            {"shape": next(s for s in SHAPES if s != item.shape)},
            {"texture": next(t for t in TEXTURES if t != item.texture)},
            {"rgb": tuple(255 - channel for channel in item.rgb)},
        ):
            items = [replace(i, **change) if i is item else i for i in scene.items]
            box = ImageChops.difference(
                picture, draw_scene(replace(scene, items=tuple(items)))
            ).getbbox()
            assert box is not None, change
            assert box[0] >= quadrant[0] and box[1] >= quadrant[1]
            assert box[2] <= quadrant[2] and box[3] <= quadrant[3]
        others = [replace(scene, character=c) for c in CHARACTERS if c != scene.character]
        assert all(draw_scene(other).tobytes() != picture.tobytes() for other in others)


def test_the_centre_of_a_plain_shape_has_its_colour():
    for scene in scenes(300):
        picture = draw_scene(scene, image_size=128)
        for item in scene.items:
            if item.texture == "plain":
                pixel = picture.getpixel((int(item.x * 128), int(item.y * 128)))
                nearest = min(
                    COLOURS,
                    key=lambda c, p=pixel: sum(
                        (a - b) ** 2 for a, b in zip(COLOURS[c], p, strict=True)
                    ),
                )
                assert nearest == item.colour


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_described_scene_names_every_shape(style, language):
    for seed, scene in enumerate(scenes(100)):
        text = scene_in_words(scene, Random(seed), language=language, style=style)
        for item in scene.items:
            assert word(item.colour, language) in text and word(item.shape, language) in text
        if scene.character:
            assert scene.character in text
    with pytest.raises(ValueError, match="style"):
        scene_in_words(scene, Random(0), style="poem")
