"""Owns how scenes of the sample world become records: a data set's files, and text alone.

`python -m dataset.synthetic` says which files there are; `__main__.py` holds its flags.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from dataset.synthetic.drawing import draw_scene
from dataset.synthetic.scenes import Scene, sample_scene
from dataset.synthetic.text import (
    LANGUAGES,
    NUM_LISTED,
    STYLES,
    QuestionAnswer,
    caption_turn,
    combination_turns,
    list_turn,
    pair_turns,
    restate,
    scene_in_words,
    scene_turns,
)

IMAGE_TAG = "<image>"
MAX_IMAGES = 1_000_000  # the width of the numbers in the file names
MAX_PAIR_TRIES = 1000
COMBINATION_EVERY = 4  # one held-out picture of so many
CHARACTER_SHARE = 0.3  # of the scenes with room


def scene_rng(split: str, seed: int, index: int | str) -> Random:
    """The generator of one record, independent of how many others are made."""
    return Random(f"{split}/{seed}/{index}")  # seeds by SHA-512, the same in every process


def make_record(
    turns: list[QuestionAnswer],
    *,
    images: Iterable[str] = (),
    prefix: str = "",
    with_types: bool = False,
) -> dict[str, Any]:
    """A record in the published format; the first question begins with `prefix` or image tags."""
    images = list(images)
    opening = prefix or "\n".join([IMAGE_TAG] * len(images))
    opening += "\n" if opening else ""
    conversations = []
    for number, turn in enumerate(turns):
        question = opening + turn.question if number == 0 else turn.question
        conversations.append({"role": "user", "content": question})
        conversations.append({"role": "assistant", "content": turn.answer})
    record: dict[str, Any] = {"conversations": conversations}
    if images:
        record["image"] = ", ".join(images)
    if with_types:
        record["types"] = [turn.type for turn in turns]
    return record


def text_conversations(
    num: int,
    *,
    seed: int = 0,
    split: str = "train",
    languages: tuple[str, ...] = LANGUAGES,
    styles: tuple[str, ...] = STYLES,
    num_turns: int = 8,
    character_share: float = CHARACTER_SHARE,
    caption_share: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Conversations about scenes described in words, with the questions that pictures get.

    They train a language model to answer such questions before it sees any picture. No held-out
    pair or scene occurs in the split "train".

    Args:
        num: how many records to yield.
        styles: see `text.scene_in_words`; drawn at random for each record.
        character_share: of the scenes with room hold a letter or digit.
        caption_share: of the records also ask for a caption, at the end.
    Raises:
        ValueError: an unknown split, language or style.
    """
    for index in range(num):
        rng = scene_rng(split, seed, f"text {index}")
        scene = sample_scene(rng, split=split, character_share=character_share)
        language = rng.choice(languages)
        words = scene_in_words(scene, rng, language=language, style=rng.choice(styles))
        turns = scene_turns(scene, rng, language=language, num_turns=num_turns)
        turns += _last_turns(scene, rng, language, caption_share)
        yield make_record(turns, prefix=words, with_types=split == "heldout")


def _last_turns(
    scene: Scene,
    rng: Random,
    language: str,
    caption_share: float,
    list_share: float = 0.0,
    num_listed: int = NUM_LISTED,
) -> list[QuestionAnswer]:
    """Requests for a caption and a list, each with its probability; a share of zero draws no
    random number, so that it changes no other text."""
    turns = []
    if caption_share and rng.random() < caption_share:
        turns.append(caption_turn(scene, rng, language=language))
    if list_share and rng.random() < list_share:
        turns.append(list_turn(scene, rng, language=language, num_listed=num_listed))
    return turns


def restated_scenes(
    num: int, *, seed: int, split: str, languages: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Plain texts that name a scene's shapes again and again, see `text.restate`."""
    for index in range(num):
        rng = scene_rng(split, seed, f"retold {index}")
        scene = sample_scene(rng, split=split, character_share=0)
        yield {"text": restate(scene, rng, language=rng.choice(languages))}


def blind_conversations(
    num: int,
    *,
    seed: int,
    split: str,
    languages: tuple[str, ...],
    num_turns: int,
    character_share: float,
) -> Iterator[dict[str, Any]]:
    """The questions that pictures get, about pictures that are not shown."""
    for index in range(num):
        rng = scene_rng(split, seed, f"blind {index}")
        scene = sample_scene(rng, split=split, character_share=character_share)
        turns = scene_turns(scene, rng, language=rng.choice(languages), num_turns=num_turns)
        yield make_record(turns, with_types=split == "heldout")


def sample_text(num: int, *, seed: int = 0) -> Iterator[str]:
    """The messages about `num` scenes of the training split that are described in words, each
    behind its role as the chat format writes it."""
    for record in text_conversations(num, seed=seed, styles=("sentences", "table")):
        for message in record["conversations"]:
            yield f"{message['role']}\n{message['content']}"


def write_dataset(
    out: Path,
    *,
    num_images: int,
    seed: int = 0,
    split: str = "train",
    num_pairs: int = 0,
    num_text: int = 0,
    num_turns: int = 8,
    image_size: int = 96,
    languages: tuple[str, ...] = LANGUAGES,
    character_share: float = CHARACTER_SHARE,
    caption_share: float = 0.0,
    list_share: float = 0.0,
    num_listed: int = NUM_LISTED,
    num_blind: int = 0,
    num_retold: int = 0,
) -> Counter[str]:
    """Write the files of a split, see `python -m dataset.synthetic --help`.

    A record file appears under its name only when it is whole, after the pictures.

    Returns:
        held-out questions per type.
    Raises:
        ValueError: an argument out of its range.
        OSError: the folder cannot be written.
    """
    options = RecordOptions(split, seed, languages, num_turns, character_share)
    last = LastTurns(caption_share, list_share, num_listed)
    images = out / f"{split}_images"
    images.mkdir(parents=True, exist_ok=True)
    pictures = []
    for index in tqdm(range(num_images), desc=f"{split} pictures", disable=None):
        pictures.append(_make_picture(index, options, last))
        draw_scene(pictures[-1].scene, image_size=image_size).save(images / pictures[-1].name)
    records = [picture.record for picture in pictures]
    records += blind_conversations(num_blind, **vars(options))
    texts = list(text_conversations(num_text, caption_share=caption_share, **vars(options)))
    texts += restated_scenes(num_retold, seed=seed, split=split, languages=languages)
    files = {
        "_captions": [picture.caption for picture in pictures],
        "_pairs": _pair_records([p for p in pictures if not p.is_combination], num_pairs, options),
        "_text": texts,
        "": records,
    }
    counts: Counter[str] = Counter()
    for suffix, rows in files.items():
        counts += _write_jsonl(out / f"{split}{suffix}.jsonl", rows)
    return counts


@dataclass(frozen=True)
class RecordOptions:
    """What the records of a split are about, in which languages, and how long they are."""

    split: str
    seed: int
    languages: tuple[str, ...]
    num_turns: int
    character_share: float


@dataclass(frozen=True)
class LastTurns:
    """How often a picture's record ends with a caption and a list, and how long the list is."""

    caption_share: float
    list_share: float
    num_listed: int


@dataclass(frozen=True)
class Picture:
    """A scene with its file's name and its two records."""

    name: str
    scene: Scene
    is_combination: bool
    record: dict[str, Any]
    caption: dict[str, Any]


def _make_picture(index: int, options: RecordOptions, last: LastTurns) -> Picture:
    split = options.split
    rng = scene_rng(split, options.seed, index)
    is_combination = split == "heldout" and index % COMBINATION_EVERY == COMBINATION_EVERY - 1
    scene = sample_scene(
        rng, split=split, is_combination=is_combination, character_share=options.character_share
    )
    name = f"{split}_{index:06d}.png"
    language = rng.choice(options.languages)
    if is_combination:
        turns = combination_turns(scene, rng, language=language)[: options.num_turns]
    else:
        turns = scene_turns(scene, rng, language=language, num_turns=options.num_turns)
        turns += _last_turns(
            scene, rng, language, last.caption_share, last.list_share, last.num_listed
        )
    record = make_record(turns, images=[name], with_types=split == "heldout")
    caption = make_record([caption_turn(scene, rng, language=language)], images=[name])
    return Picture(name, scene, is_combination, record, caption)


def _pair_records(
    pictures: list[Picture], num_pairs: int, options: RecordOptions
) -> Iterator[dict[str, Any]]:
    if num_pairs and len(pictures) < 2:
        raise ValueError(
            f"pairs need two pictures at least; got {len(pictures)}: raise --num_images"
        )
    for index in range(num_pairs):
        rng = scene_rng(options.split, options.seed, f"pair {index}")
        for _ in range(MAX_PAIR_TRIES):
            first, second = rng.sample(pictures, 2)
            language = rng.choice(options.languages)
            turns = pair_turns(first.scene, second.scene, rng, language=language)
            if turns := turns[: options.num_turns]:
                images = [first.name, second.name]
                yield make_record(turns, images=images, with_types=options.split == "heldout")
                break
        else:
            raise ValueError(
                f"no two of the {len(pictures)} pictures differ in what a pair asks for; "
                "raise --num_images or set --num_pairs 0"
            )


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Counter[str]:
    """Write records, whole or not at all (none: no file); returns the questions per type."""
    counts: Counter[str] = Counter()
    partial = path.with_name(path.name + ".part")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            counts.update(record.get("types", ()))
    if partial.stat().st_size:
        os.replace(partial, path)
    else:
        partial.unlink()
        path.unlink(missing_ok=True)
    return counts
