"""Owns the embedded sample data: records, pictures and texts of the sample world, as files.

    python -m dataset.synthetic --out dataset/sample --num_images 4000 --num_text 20000
    python -m dataset.synthetic --out dataset/sample --num_images 1000 --split heldout

writes into --out, for the split S (train or heldout):

    S_images/          the pictures (PNG)
    S.jsonl            questions, several turns a picture
    S_captions.jsonl   a caption a picture
    S_pairs.jsonl      questions that compare two of the pictures
    S_text.jsonl       the questions about scenes told in words, without pictures (--num_text),
                       and scenes told of over and over as plain text (--num_retold)

--num_blind adds questions without any picture or telling to S.jsonl: they teach how likely each
answer is when nothing is seen, which makes "no image" an honest control.

The same arguments give the same bytes. A held-out question has one right answer, to be compared
as text, and its type stands in the record's field "types", one per turn in order. A quarter of the
held-out pictures hold a colour-shape pair that never occurs in training; about these only the type
"combination" asks, and pairs leave them out.

    python -m dataset.synthetic --out dataset/eval_images --eval_images 1

writes a few named pictures instead, and `--eval_images 2` two of them in a folder each, for
`dataset/eval_multi_images`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from tqdm import tqdm

from dataset.synthetic.drawing import draw_scene
from dataset.synthetic.scenes import Scene, sample_scene
from dataset.synthetic.text import (
    LANGUAGES,
    NUM_LISTED,
    STYLES,
    Turn,
    caption_turn,
    combination_turns,
    describe,
    list_turn,
    pair_turns,
    retell,
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
    turns: list[Turn], *, images: Iterable[str] = (), prefix: str = "", with_types: bool = False
) -> dict:
    """A record in the published format; what stands for the scene opens the first question."""
    images = list(images)
    opening = prefix or "\n".join([IMAGE_TAG] * len(images))
    opening += "\n" if opening else ""
    conversations = []
    for number, turn in enumerate(turns):
        question = opening + turn.question if number == 0 else turn.question
        conversations.append({"role": "user", "content": question})
        conversations.append({"role": "assistant", "content": turn.answer})
    record: dict = {"conversations": conversations}
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
) -> Iterator[dict]:
    """Conversations about scenes told in words, with the questions that pictures get.

    For a language model that shall answer them before it sees any picture. No held-out pair or
    scene occurs in the split "train".

    Args:
        num: how many records to yield.
        styles: see `synthetic_text.describe`; drawn at random for each record.
        character_share: of the scenes with room hold a letter or digit.
        caption_share: of the records also ask for a caption, at the end.
    Raises:
        ValueError: an unknown split, language or style.
    """
    for index in range(num):
        rng = scene_rng(split, seed, f"text {index}")
        scene = sample_scene(rng, split=split, character_share=character_share)
        language = rng.choice(languages)
        told = describe(scene, rng, language=language, style=rng.choice(styles))
        turns = scene_turns(scene, rng, language=language, num_turns=num_turns)
        turns += _last_turns(scene, rng, language, caption_share)
        yield make_record(turns, prefix=told, with_types=split == "heldout")


def _last_turns(
    scene: Scene,
    rng: Random,
    language: str,
    caption_share: float,
    list_share: float = 0.0,
    num_listed: int = NUM_LISTED,
) -> list[Turn]:
    """Requests for a caption and a list, each with its chance; none is drawn where it is zero."""
    turns = []
    if caption_share and rng.random() < caption_share:
        turns.append(caption_turn(scene, rng, language=language))
    if list_share and rng.random() < list_share:
        turns.append(list_turn(scene, rng, language=language, num_listed=num_listed))
    return turns


def retold_scenes(num: int, *, seed: int, split: str, languages: tuple[str, ...]) -> Iterator[dict]:
    """Plain texts that tell of a scene over and over, see `synthetic_text.retell`."""
    for index in range(num):
        rng = scene_rng(split, seed, f"retold {index}")
        scene = sample_scene(rng, split=split, character_share=0)
        yield {"text": retell(scene, rng, language=rng.choice(languages))}


def blind_conversations(
    num: int,
    *,
    seed: int,
    split: str,
    languages: tuple[str, ...],
    num_turns: int,
    character_share: float,
) -> Iterator[dict]:
    """The questions that pictures get, about pictures that are not shown."""
    for index in range(num):
        rng = scene_rng(split, seed, f"blind {index}")
        scene = sample_scene(rng, split=split, character_share=character_share)
        turns = scene_turns(scene, rng, language=rng.choice(languages), num_turns=num_turns)
        yield make_record(turns, with_types=split == "heldout")


def sample_text(num: int, *, seed: int = 0) -> Iterator[str]:
    """What the training split says about `num` scenes told in words, a message at a time, under
    its role as the chat format writes it."""
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
) -> Counter:
    """Write a split as described at the top of this file.

    A record file appears under its name only when it is whole, after the pictures.

    Returns:
        held-out questions per type.
    Raises:
        ValueError: an argument out of its range.
        OSError: the folder cannot be written.
    """
    options = {"languages": languages, "num_turns": num_turns, "split": split, "seed": seed}
    images = out / f"{split}_images"
    images.mkdir(parents=True, exist_ok=True)
    comparable, records, captions = [], [], []
    for index in tqdm(range(num_images), desc=f"{split} pictures", disable=None):
        rng = scene_rng(split, seed, index)
        is_combination = split == "heldout" and index % COMBINATION_EVERY == COMBINATION_EVERY - 1
        scene = sample_scene(
            rng, split=split, is_combination=is_combination, character_share=character_share
        )
        name = f"{split}_{index:06d}.png"
        draw_scene(scene, image_size=image_size).save(images / name)
        language = rng.choice(languages)
        if is_combination:
            turns = combination_turns(scene, rng, language=language)[:num_turns]
        else:
            turns = scene_turns(scene, rng, language=language, num_turns=num_turns)
            turns += _last_turns(scene, rng, language, caption_share, list_share, num_listed)
            comparable.append((name, scene))
        records.append(make_record(turns, images=[name], with_types=split == "heldout"))
        told = [caption_turn(scene, rng, language=language)]
        captions.append(make_record(told, images=[name]))
    asked = options | {"character_share": character_share}
    records += blind_conversations(num_blind, **asked)
    texts = list(text_conversations(num_text, caption_share=caption_share, **asked))
    texts += retold_scenes(num_retold, seed=seed, split=split, languages=languages)
    files = {
        "_captions": captions,
        "_pairs": _pair_records(comparable, num_pairs, **options),
        "_text": texts,
        "": records,
    }
    counts: Counter = Counter()
    for suffix, rows in files.items():
        counts += _write_jsonl(out / f"{split}{suffix}.jsonl", rows)
    return counts


def _pair_records(
    scenes: list[tuple[str, Scene]],
    num_pairs: int,
    *,
    seed: int,
    split: str,
    languages: tuple[str, ...],
    num_turns: int,
) -> Iterator[dict]:
    if num_pairs and len(scenes) < 2:
        raise ValueError(f"pairs need two pictures at least; got {len(scenes)}: raise --num_images")
    for index in range(num_pairs):
        rng = scene_rng(split, seed, f"pair {index}")
        for _ in range(MAX_PAIR_TRIES):
            (name, first), (other, second) = rng.sample(scenes, 2)
            turns = pair_turns(first, second, rng, language=rng.choice(languages))[:num_turns]
            if turns:
                yield make_record(turns, images=[name, other], with_types=split == "heldout")
                break
        else:
            raise ValueError(
                f"no two of the {len(scenes)} pictures differ in what a pair asks for; "
                "raise --num_images or set --num_pairs 0"
            )


def _write_jsonl(path: Path, records: Iterable[dict]) -> Counter:
    """Write records, whole or not at all (none: no file); returns the questions per type."""
    counts, partial = Counter(), path.with_name(path.name + ".part")
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
