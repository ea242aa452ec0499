"""Offers multiple-choice files about the pictures of the painted model."""

import base64
import csv

from support.painted import COLOURS

MMBENCH = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image",
           "l2-category", "split")  # fmt: skip


def png(painted, i: int) -> bytes:
    return (painted / "images" / f"test{i:02}.png").read_bytes()


def options_of(i: int) -> tuple[list[str], str]:
    """The colours in another order for each picture, and the letter of the right one."""
    names = list(COLOURS)
    turned = names[i % 2 :] + names[: i % 2]
    return turned, "ABC"[turned.index(names[i % 3])]


def write_tsv(path, painted, *, count: int = 10, **changes) -> None:
    """A file like MMBench's; the last row points to the first one's picture."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, MMBENCH, delimiter="\t", restval="")
        writer.writeheader()
        for i in range(count):
            shown = 0 if i == count - 1 else i
            options, answer = options_of(shown)
            image = base64.b64encode(png(painted, shown)).decode()
            row = {
                "index": 100 + i,
                "question": "What is in the picture?",
                "answer": answer,
                "category": "colour" if i % 2 else "paint",
                "l2-category": "attribute",
                "image": image if i < count - 1 else "100",
                "split": "dev",
            }
            writer.writerow(row | dict(zip("ABC", options, strict=True)) | changes)
