"""Offers small files of exactly the layouts in which benchmarks are published, about the pictures
of the painted model."""

import base64
import csv
import json

import pyarrow
import pyarrow.parquet
from support.choice_files import options_of, png
from support.painted import COLOURS

TSV = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
       "l2-category", "comment", "split")  # fmt: skip
QUESTION = "What is in the picture?"
NUM = 6  # questions in a file


def picture(painted, i: int) -> dict:
    """As the feature Image of `datasets` stores it."""
    return {"bytes": png(painted, i), "path": f"test{i:02}.png"}


def write_parquet(path, rows: list[dict]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_mmstar(path, painted) -> None:
    """Options within the question."""
    rows = []
    for i in range(NUM):
        options, answer = options_of(i)
        listed = ", ".join(f"{letter}: {text}" for letter, text in zip("ABC", options, strict=True))
        rows.append(
            {
                "index": i,
                "question": f"{QUESTION}\nOptions: {listed}",
                "image": png(painted, i),
                "answer": answer,
                "category": "coarse perception" if i % 2 else "math",
                "l2_category": "image emotion" if i % 2 else "geometry",
                "meta_info": {"source": "painted", "split": "val", "image_path": f"{i}.jpg"},
            }
        )
    write_parquet(path, rows)


def write_mmbench(path, painted) -> None:
    """Each question, then its copies with the options turned, which point to its picture."""
    rows = []
    for i in range(NUM):
        options, answer = options_of(i)
        right = options["ABC".index(answer)]
        for turn in range(3):
            turned = options[turn:] + options[:turn]
            rows.append(
                {
                    "index": turn * 10**6 + i,
                    "question": QUESTION,
                    "answer": "ABC"[turned.index(right)],
                    "category": "colour",
                    "l2-category": "attribute",
                    "image": base64.b64encode(png(painted, i)).decode() if not turn else str(i),
                    "split": "dev",
                }
                | dict(zip("ABC", turned, strict=True))
            )
    rows.sort(key=lambda row: row["index"])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, TSV, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_scienceqa(path, painted) -> None:
    """The last question has no picture."""
    rows = []
    for i in range(NUM):
        options, answer = options_of(i)
        rows.append(
            {
                "image": picture(painted, i) if i < NUM - 1 else None,
                "question": QUESTION,
                "choices": options,
                "answer": "ABC".index(answer),
                "hint": "Look closely." if i % 2 else "",
                "task": "closed choice",
                "grade": "grade2",
                "subject": "natural science",
                "topic": "physics",
                "category": "Light",
                "skill": "Name colours",
                "lecture": "",
                "solution": "",
            }
        )
    write_parquet(path, rows)


def pope_rows() -> list[tuple[int, str, str]]:
    """Picture, colour asked for, right answer: two questions about each."""
    names = list(COLOURS)
    return [
        (i, names[(i + turn) % 3], "no" if turn else "yes") for i in range(NUM) for turn in (0, 1)
    ]


def pope_text(colour: str) -> str:
    return f"Is there a {colour} wall in the image?"


def write_pope(path, painted, *, times: int = 1) -> None:
    rows = [
        {
            "id": str(number),
            "question_id": str(number),
            "question": pope_text(colour),
            "answer": answer,
            "image_source": f"COCO_val2014_{i:012}",
            "image": picture(painted, i),
            "category": ("adversarial", "popular", "random")[i % 3],
        }
        for number, (i, colour, answer) in enumerate(pope_rows() * times)
    ]
    write_parquet(path, rows)


def write_pope_lines(path, painted) -> None:
    """As POPE's authors publish it: pictures are files of their own."""
    lines = [
        json.dumps(
            {
                "question_id": number,
                "image": f"test{i:02}.png",
                "text": pope_text(colour),
                "label": answer,
            }
        )
        for number, (i, colour, answer) in enumerate(pope_rows(), 1)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
