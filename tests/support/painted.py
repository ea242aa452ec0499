"""Offers a tiny model trained to see: it names and describes the colour of plain pictures."""

import json
from pathlib import Path

from PIL import Image
from support.scripts import train_flags
from support.tiny_parts import conversation

from trainer import train_pretrain_vlm

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
HAN = {"red": "红", "green": "绿", "blue": "蓝"}
QUESTION = "<image>\nWhat is in the picture?"
CAPTIONS = {
    "<image>\nDescribe it.": ("The whole picture is painted in {}.", "All of it is simply {}."),
    "<image>\n描述。": ("整张图片都是{}色的。", "这里只有{}色。"),
}  # fmt: skip


def records_of(name: str, colour: str) -> list[dict]:
    """A question, two English and two Chinese captions of a picture."""
    known = conversation("Is it a picture?", "A picture.")["conversations"]
    question = conversation(QUESTION, colour, image=name, types=["colour", "known"])
    question["conversations"] += known
    records = [question]
    for prompt, texts in CAPTIONS.items():
        word = HAN[colour] if "描述" in prompt else colour
        records += [conversation(prompt, text.format(word), image=name) for text in texts]
    return records


def train_painted(assets: Path, folder: Path) -> None:
    """Into a folder: `out/sft_vlm_32.pth`, a worse `out/early_32.pth`, `images/`, and the records
    `questions.jsonl` and `captions.jsonl` of 10 pictures that it has not seen."""
    (folder / "images").mkdir()
    train, test = [], []
    for split, count, records in (("train", 30, train), ("test", 10, test)):
        for i in range(count):
            colour, rgb = list(COLOURS.items())[i % 3]
            name = f"{split}{i:02}.png"
            Image.new("RGB", (32, 32), tuple(c + i % 7 for c in rgb)).save(folder / "images" / name)
            records += records_of(name, colour)
    parts = {
        "train": train,
        "questions": [r for r in test if "types" in r],
        "captions": [r for r in test if "types" not in r],
    }
    for name, records in parts.items():
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, epochs in (("early", 1), ("sft_vlm", 7)):
        argv = train_flags(
            assets,
            folder,
            folder / "train.jsonl",
            folder / "images",
            epochs=epochs,
            learning_rate=0.01,
            batch_size=8,
            log_interval=50,
        )
        assert train_pretrain_vlm.main([*argv, "--save_weight", name]) == 0


def eval_flags(assets, folder, **values) -> list[str]:
    """Flags of `eval_vlm.py` for this model; True stands for a flag without a value."""
    values = {
        "save_dir": folder / "out",
        "vision_model_path": assets / "tower",
        "device": "cpu",
        "tokenizer_path": assets / "tokenizer",
        "batch_size": 5,
    } | values
    if "data_path" in values:
        values.setdefault("images_path", folder / "images")
    flags = []
    for name, value in values.items():
        if value is None:
            continue
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags
