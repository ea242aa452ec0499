"""Writes the same records in every layout that can be read."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from support.tiny_parts import make_records

Columns = dict[str, tuple[list, pyarrow.DataType | None]]
BINARIES = pyarrow.list_(pyarrow.binary())
STRUCT = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


def read_lines(data: Path) -> list[dict]:
    return [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]


def names_of(record: dict) -> list[str]:
    return [name.strip() for name in record.get("image", "").split(",") if name.strip()]


def in_parts(turns: list[dict]) -> list[dict]:
    """Turns whose contents are typed parts, the tags as parts of their own."""
    found = []
    for turn in turns:
        texts = turn["content"].split("<image>")
        parts = [{"type": "text", "text": texts[0]}] if texts[0] else []
        for text in texts[1:]:
            parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
        found.append({"role": turn["role"], "content": parts})
    return found


def write_table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_saved_dataset(folder: Path, tables: list[pyarrow.Table]) -> Path:
    """A folder as `datasets.Dataset.save_to_disk` writes it.
    Source: https://huggingface.co/docs/datasets/package_reference/main_classes"""
    folder.mkdir()
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def every_layout(folder: Path, *, num_records: int = 24) -> dict[str, tuple[Path, Path | None]]:
    """The records of `make_records(multi=True)` in each layout: data and images, by name."""
    data, images = make_records(folder, num_records=num_records, multi=True)
    raw = read_lines(data)
    turns = [record["conversations"] for record in raw]
    named = [names_of(record) for record in raw]
    encoded = [[(images / name).read_bytes() for name in names] for names in named]
    structs = [[{"bytes": one, "path": "x.png"} for one in some] for some in encoded]
    texts = [json.dumps(one) for one in turns]
    old = [[{"from": t["role"], "value": t["content"]} for t in one] for one in turns]
    parts = [in_parts(one) for one in turns]
    found: dict[str, tuple[Path, Path | None]] = {"folder": (data, images)}

    with zipfile.ZipFile(folder / "zipped.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(images.iterdir()):
            archive.write(path, f"images/{path.name}")
    found["zip"] = data, folder / "zipped.zip"
    array = folder / "llava.json"
    llava = [
        {"id": i, "image": n, "conversations": t}
        for i, (n, t) in enumerate(zip(named, old, strict=True))
    ]
    array.write_text(json.dumps(llava, indent=2, ensure_ascii=False), encoding="utf-8")
    found["JSON array"] = array, images
    swift = folder / "swift.jsonl"
    lines = [{"messages": t, "images": n} for t, n in zip(turns, named, strict=True)]
    swift.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found["ms-swift"] = swift, images

    lists = pyarrow.array(encoded, BINARIES)
    typed = {"messages": parts, "images": pyarrow.array(structs, pyarrow.list_(STRUCT))}
    found["Parquet"] = write_table(folder / "a.parquet", {"conversations": texts,
        "image_bytes": lists}), None  # fmt: skip
    found["TRL"] = write_table(folder / "trl.parquet", typed, row_group_size=7), None
    found["names in Parquet"] = write_table(folder / "named.parquet", {"conversations": old,
        "images": named}), images  # fmt: skip
    shards = folder / "shards" / "data"
    shards.mkdir(parents=True)
    table = pyarrow.table({"conversations": turns, "images": typed["images"]})
    for i in range(3):
        name, start = f"train-{i:05d}-of-00003.parquet", i * num_records // 3
        pyarrow.parquet.write_table(table.slice(start, num_records // 3), shards / name)
    found["shards"] = folder / "shards", None
    found["pattern"] = shards / "*.parquet", None
    half = num_records // 2
    halves = [table.slice(0, half), table.slice(half)]
    found["Arrow folder"] = write_saved_dataset(folder / "saved", halves), None
    files = []
    for i, (one, some) in enumerate(zip(turns, encoded, strict=True)):
        files += [(f"{i:04d}.{j}.png", data) for j, data in enumerate(some)]
        files.append((f"{i:04d}.json", json.dumps({"conversations": one}).encode()))
    found["tar"] = write_tar(folder / "a.tar", files), None
    return found
