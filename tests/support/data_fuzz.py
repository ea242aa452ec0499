"""Offers broken data sets, made from whole ones by a seed, and a judge of their records."""

import csv
import io
import json
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image
from support.tiny_parts import make_records

KINDS = ("lines", "fields", "pictures", "zip", "parquet", "columns", "array", "table", "shards")
ODD_VALUES = (None, 3, 2.5, True, "", "x", [], {}, [None], ["x"], {"a": 1}, [[]], "<image>")


def make_whole(folder: Path) -> None:
    """Whole files: JSON lines with a folder and a zip of pictures, Parquet of two layouts, a JSON
    array and a table, all of the same pictures."""
    data, images = make_records(folder, num_records=8, multi=True)
    data.rename(folder / "data.jsonl")
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(images.iterdir()):
            archive.write(path, path.name)
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    (folder / "data.json").write_text(json.dumps(records, indent=1))
    rows = [
        {
            "conversations": json.dumps(record["conversations"]),
            "image_bytes": [
                (images / name).read_bytes() for name in record.get("image", "").split(", ") if name
            ],
        }
        for record in records
    ]
    write_table(folder / "data.parquet", rows)
    write_table(folder / "shards.parquet", [
        {"images": [{"bytes": one, "path": "x.png"} for one in row["image_bytes"]],
         "texts": [{"user": "What?", "assistant": "A picture."}]}
        for row in rows
    ])  # fmt: skip
    lines = [f"0_{n}.png,A caption.\n" for n in range(8)]
    (folder / "table.csv").write_text("image,caption\n" + "".join(lines))


def write_table(path: Path, rows: list[dict]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)


def damage(content: bytes, dice: random.Random) -> bytes:
    """Bytes flipped, left out, doubled, or cut off at the end."""
    content_ = bytearray(content)
    how = dice.choice(("flip", "flip", "cut", "drop", "double", "zero"))
    at = dice.randrange(len(content_))
    size = dice.randrange(1, 40)
    if how == "flip":
        for _ in range(dice.randrange(1, 20)):
            content_[dice.randrange(len(content_))] ^= 1 << dice.randrange(8)
    elif how == "cut":
        del content_[at:]
    elif how == "drop":
        del content_[at : at + size]
    elif how == "double":
        content_[at:at] = content_[at : at + size]
    else:
        content_[at : at + size] = bytes(len(content_[at : at + size]))
    return bytes(content_)


def change_field(record: dict, dice: random.Random) -> dict:
    """A field, of the record or of a message, dropped, renamed or of another type."""
    record = json.loads(json.dumps(record))
    holder = dice.choice([record, record, *record["conversations"]])
    name = dice.choice(sorted(holder))
    how = dice.choice(("drop", "rename", "retype"))
    value = holder.pop(name)
    if how == "rename":
        holder[dice.choice(("images", "text", "messages", "from", name.upper()))] = value
    elif how == "retype":
        holder[name] = dice.choice(ODD_VALUES)
    return record


def break_set(whole: Path, folder: Path, case: int) -> tuple[str, Path, Path | None]:
    """A broken copy of the whole files.

    Returns:
        Its kind, the data file and the images, if it has them apart.
    """
    dice = random.Random(case)
    shutil.copytree(whole, folder)
    kind, images = KINDS[case % len(KINDS)], folder / "images"
    data = folder / "data.jsonl"
    if kind == "lines":
        data.write_bytes(damage(data.read_bytes(), dice))
    elif kind == "fields":
        lines = [json.loads(line) for line in data.read_text().splitlines()]
        lines = [change_field(one, dice) if dice.random() < 0.5 else one for one in lines]
        data.write_text("".join(json.dumps(one) + "\n" for one in lines))
    elif kind == "pictures":
        for path in dice.sample(sorted(images.iterdir()), 2):
            path.write_bytes(damage(path.read_bytes(), dice))
        dice.choice(sorted(images.iterdir())).unlink()
    elif kind == "zip":
        images = folder / "images.zip"
        images.write_bytes(damage(images.read_bytes(), dice))
    elif kind == "columns":
        data = folder / "data.parquet"
        _change_columns(data, dice)
    else:
        names = {"parquet": "data.parquet", "array": "data.json", "table": "table.csv"}
        data = folder / names.get(kind, "shards.parquet")
        data.write_bytes(damage(data.read_bytes(), dice))
    return kind, data, None if data.suffix == ".parquet" else images


def _change_columns(path: Path, dice: random.Random) -> None:
    """Columns of another type, with nulls, dropped or renamed, as other writers have them."""
    rows = pyarrow.parquet.read_table(path).to_pylist()
    how = dice.choice(("null", "text", "single", "float", "drop", "rename", "struct", "pictures"))
    for row in rows:
        if how == "null" and dice.random() < 0.5:
            row[dice.choice(sorted(row))] = None
        elif how == "text":
            row["image_bytes"] = "a.png"
        elif how == "single":
            row["image_bytes"] = row["image_bytes"][0] if row["image_bytes"] else None
        elif how == "float":
            row["image_bytes"] = 0.5
        elif how == "drop":
            row.pop("conversations")
        elif how == "rename":
            row["messages"] = row.pop("conversations")
        elif how == "struct":
            row["conversations"] = json.loads(row["conversations"])
        elif how == "pictures" and dice.random() < 0.5:
            row["image_bytes"] = [damage(one, dice) for one in row["image_bytes"]]
    write_table(path, rows)


def bad_records(data: Path, images: Path | None) -> set[str] | None:
    """Places of the records that are no good ("3" of lines, "row 2" of Parquet), judged with plain
    json, pyarrow, zipfile and Pillow; None where the file as a whole is none."""
    try:
        if data.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(data).to_pylist()
            return {f"row {n}" for n, row in enumerate(rows) if not _is_good_row(row)}
        lines = data.read_bytes().split(b"\n")
        read = _reader(images)
        return {
            str(n) for n, line in enumerate(lines, 1) if line.strip() and not _is_good(line, read)
        }
    except Exception:  # whatever the libraries say of a damaged file, it is none
        return None


def good_answers(kind: str, data: Path, images: Path | None) -> list[list[str]] | None:
    """The answers of each record that is good, in order, of what only a conversion reads; None
    where the file as a whole is none. Judged as `bad_records`, and with plain csv."""
    try:
        if kind == "shards":
            rows = pyarrow.parquet.read_table(data).to_pylist()
            return [a for row in rows if (a := _answers_of_row(row)) is not None]
        read = _reader(images)
        if kind == "array":
            found = [json.dumps(one).encode() for one in json.loads(data.read_bytes())]
            return [_answers(json.loads(one)) for one in found if _is_good(one, read)]
        text = data.read_bytes().decode("utf-8", "surrogateescape")
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        places = [[h.strip().lower() for h in header].index(n) for n in ("image", "caption")]
        return [
            a for row in rows if row and (a := _answer_of_cells(row, *places, read)) is not None
        ]
    except Exception:
        return None


def _answers(record: dict) -> list[str]:
    turns = _turns_of(record)
    return [
        turn.get("content", turn.get("value"))
        for turn in turns
        if turn.get("role", turn.get("from")) in ("assistant", "gpt")
    ]


def _answers_of_row(row: dict) -> list[str] | None:
    try:
        for picture in row["images"]:
            Image.open(io.BytesIO(picture["bytes"])).load()
        return [turn["assistant"] for turn in row["texts"]]
    except Exception:
        return None


def _answer_of_cells(row: list[str], image: int, caption: int, read) -> list[str] | None:
    try:
        "".join(row).encode()  # a cell that is not UTF-8 spoils its row
        Image.open(io.BytesIO(read(row[image].strip()))).load()
        return [row[caption]] if row[caption].strip() else None
    except Exception:
        return None


def _reader(images: Path):
    if images.is_dir():
        return lambda name: (images / name).read_bytes()
    archive = zipfile.ZipFile(images)
    return archive.read


def _is_good(line: bytes, read) -> bool:
    try:
        record = json.loads(line.decode())
        names = record.get("image") or record.get("images") or []
        names = names.split(", ") if isinstance(names, str) else names
        return _is_conversation(_turns_of(record), list(map(read, names)))
    except Exception:
        return False


def _turns_of(record: dict) -> Any:
    turns = record.get("conversations")
    return record["messages"] if turns is None else turns


def _is_good_row(row: dict) -> bool:
    try:
        images = row["image_bytes"] or []
        images = [images] if isinstance(images, bytes) else images
        turns = _turns_of(row)
        return _is_conversation(json.loads(turns) if isinstance(turns, str) else turns, images)
    except Exception:
        return False


def _is_conversation(turns: list[dict], images: list[bytes]) -> bool:
    roles = [turn.get("role", turn.get("from")) for turn in turns]
    texts = [turn.get("content", turn.get("value")) for turn in turns]
    texts = ["".join(text) if isinstance(text, list) else text for text in texts]  # typed parts
    asked = "".join(t for r, t in zip(roles, texts, strict=True) if r not in ("assistant", "gpt"))
    for image in images:
        Image.open(io.BytesIO(image)).load()
    return (
        all(role in ("user", "human", "assistant", "gpt") for role in roles)
        and ("assistant" in roles or "gpt" in roles)
        and "".join(texts).count("<image>") == asked.count("<image>") == len(images)
        and not any("\ud800" <= c <= "\udfff" for c in "".join(texts))
        and not any(set(turn) & {"images", "image"} for turn in turns)
    )
