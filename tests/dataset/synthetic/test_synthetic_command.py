"""If this fails, `python -m dataset.synthetic` writes other records than its flags ask for, or does
not say what is wrong with them.
"""

import json
from pathlib import Path

import pytest
from PIL import Image
from support.scripts import ROOT

from dataset.synthetic import __main__ as command
from dataset.synthetic import sample_data as synthetic
from dataset.synthetic.scenes import sample_scene
from dataset.synthetic.text import QUESTIONS, word

LANGUAGES = ("en", "zh")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("which", "folder"), [(1, "eval_images"), (2, "eval_multi_images")])
def test_eval_images_are_the_committed_ones(which, folder, tmp_path):
    assert command.main(["--out", str(tmp_path), "--eval_images", str(which)]) == 0
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*.png")}
    root = ROOT / "dataset" / folder
    committed = {path.relative_to(root): path for path in root.rglob("*.png")}
    assert made.keys() == committed.keys() and "red-circle" in "".join(map(str, made))
    for name, path in committed.items():
        with Image.open(path) as image, Image.open(made[name]) as again:
            assert image.tobytes() == again.tobytes()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num_images", "0"], "--num_images must be 1 to"),
        (["--image_size", "8"], "--image_size must be 32 to 1024, got 8"),
        (["--num_images", "1", "--num_pairs", "1"], "pairs need two pictures"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_one_line(tmp_path, capsys, flags, says):
    assert command.main(["--out", str(tmp_path), *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and says in error


def test_command_line_prints_types_and_chance(tmp_path, capsys):
    out = str(tmp_path)
    assert command.main(["--out", out, "--num_images", "20", "--split", "heldout"]) == 0
    printed = capsys.readouterr().out
    assert "position: " in printed and "chance 25.0%" in printed
    assert len(read_jsonl(tmp_path / "heldout_pairs.jsonl")) == 5


def test_blind_retold_and_captioned_records(tmp_path):
    argv = [
        "--out",
        str(tmp_path),
        *"--num_images 20 --num_pairs 0 --num_blind 30 --num_text 20 --num_retold 40".split(),
        *"--caption_share 1".split(),
    ]
    assert command.main(argv) == 0
    records = read_jsonl(tmp_path / "train.jsonl")
    shown = [r for r in records if "image" in r]
    blind = [r for r in records if "image" not in r]
    assert (len(shown), len(blind)) == (20, 30)
    for record in blind:
        first = record["conversations"][0]["content"]
        assert first == first.strip() and "<image>" not in first
    assert all(r["conversations"][-2]["content"] in captions_asked() for r in shown)
    texts = read_jsonl(tmp_path / "train_text.jsonl")
    retold = [r["text"] for r in texts if "text" in r]
    assert len(texts) == 60 and len(retold) == 40
    for text in retold:
        pieces = text.replace("，", ", ").split(", ")
        assert len(pieces) == 12 and len({len(p) for p in pieces}) > 1
    assert any("red" in t for t in retold) and any("红色" in t for t in retold)


@pytest.mark.parametrize("share, is_told", [("0", False), ("1", True)])
def test_character_share_holds_for_what_is_told_and_asked_without_pictures(
    tmp_path, share, is_told
):
    argv = [
        "--out",
        str(tmp_path),
        *"--num_images 1 --num_pairs 0 --num_blind 60 --num_text 60 --split heldout".split(),
        "--character_share",
        share,
    ]
    assert command.main(argv) == 0
    for records in (
        read_jsonl(tmp_path / "heldout.jsonl")[1:],
        read_jsonl(tmp_path / "heldout_text.jsonl"),
    ):
        assert len(records) == 60
        assert any("character" in record["types"] for record in records) == is_told


def test_lists_name_what_belongs_together(tmp_path):
    argv = ["--out", str(tmp_path), "--num_images", "30", "--num_pairs", "0", "--list_share", "1"]
    assert command.main(argv) == 0
    for index, record in enumerate(read_jsonl(tmp_path / "train.jsonl")):
        scene = sample_scene(synthetic.scene_rng("train", 0, index), character_share=0.3)
        told = record["conversations"][-1]["content"]
        language = "en" if told.isascii() else "zh"
        pieces = told.split(", " if language == "en" else "，")
        belong = [
            {word(n, language) for n in (item.colour, item.shape, item.place)}
            for item in scene.items
        ]
        assert len(pieces) == 10
        for piece in pieces:
            assert any(all(w in piece for w in words) for words in belong), piece


def captions_asked() -> set[str]:
    return {q for language in LANGUAGES for q in QUESTIONS[language]["caption", None]}
