"""Owns opening a source: which layout a file or folder has, by its columns or fields."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.converting.json_index import JsonArray, index_arrays
from dataset.converting.layouts import (
    SUFFIXES,
    CocoCaptions,
    FineVision,
    Joined,
    Layout,
    OwnRecords,
    ShareGpt,
    TextBeside,
    Vqa,
)
from dataset.converting.pictures import SourcePictures
from dataset.converting.table_rows import CsvCaptions
from dataset.examining.sources import Sources, named_by
from dataset.records.data_file import NO_RECORDS, emptiness_of
from dataset.records.layout import TURN_FIELDS
from dataset.records.reader import (
    DATASETS_FILES,
    PARQUET_SUFFIXES,
    find_files,
    is_pattern,
    list_files,
)

SHARD_SUFFIXES = (*PARQUET_SUFFIXES, ".tar", ".arrow")
LINES_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (*LINES_SUFFIXES, ".json")
LAYOUTS = {
    "own": "what training reads: JSON lines, Parquet, WebDataset tars, folders of datasets",
    "llava": "a JSON array with conversations (LLaVA, ShareGPT) or messages",
    "coco": "COCO captions: a JSON object with images and annotations",
    "vqa": "VQA v2: a JSON object with questions, the answers by --annotations",
    "csv": "a CSV or TSV with columns image and caption",
    "folder": "a folder of pictures with .txt files beside them",
    "finevision": "Parquet with columns images and texts (FineVision, the Cauldron)",
}


@dataclass(frozen=True)
class Source:
    """What is converted.

    path: a file or folder. images_path: folder or zip of its pictures; None: the file's own folder,
    where a layout needs one. annotations: VQA's answers. prompt: the question for captions.
    fix_image_count: drop `<image>` tags for which a record has no picture.
    """

    path: Path
    images_path: Path | None
    annotations: Path | None
    prompt: str
    fix_image_count: bool = False

    def pictures(self) -> SourcePictures:
        return SourcePictures(self.images_path or self.path.parent)


def open_sources(paths: Sequence[Path], source: Callable[[Path], Source], layout: str) -> Joined:
    """Several sources as one; a folder of data files counts as its files.

    Args:
        layout: one of `LAYOUTS`, or "auto".
    Raises:
        FileNotFoundError: a source is not there.
        ValueError: it has no layout that is known, or not the one named.
    """
    kept: list[Layout] = []
    empty: list[Path] = []
    for path in paths:
        found = {file: open_layout(source(file), layout) for file in _files_of(path, layout)}
        without = [file for file, opened in found.items() if _is_empty(opened)]
        if len(without) < len(found):
            empty += without
            found = {file: opened for file, opened in found.items() if file not in without}
        kept += found.values()
    return Joined(kept, emptiness_of(empty))


def _is_empty(layout: Layout) -> bool:
    """Whether a source is sound and holds no record."""
    return not len(layout) and all(fault.message.endswith(NO_RECORDS) for fault in layout.faults)


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets.save_to_disk`."""
    return any((path / name).is_file() for name in DATASETS_FILES)


def resolve(path: Path) -> list[Path]:
    """The files of a pattern; else the path itself.

    Raises:
        FileNotFoundError: nothing matches it. ValueError: the files are of several kinds.
    """
    try:
        return find_files(path) if is_pattern(path) else [path]
    except FileNotFoundError as error:
        raise FileNotFoundError(named_by("SOURCE", error)) from None


def _files_of(path: Path, layout: str) -> list[Path]:
    if not path.is_dir() or is_saved_dataset(path) or layout == "folder":
        return [path]
    if shards := list_files(path, SHARD_SUFFIXES):
        return shards
    has_texts = any(path.rglob("*.txt"))  # beside pictures, which may have .json files too
    return ([] if has_texts else list_files(path, JSON_SUFFIXES)) or [path]


def open_layout(source: Source, layout: str) -> Layout:
    """A source in its layout; raises as `open_sources`."""
    path = source.path
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path} is a FIFO or device; name a file or a folder")
    found = _recognise(path) if layout == "auto" else layout
    if path.is_dir() != (found == "folder" or found == "own" and is_saved_dataset(path)):
        kind = "a folder" if path.is_dir() else "a file"
        raise ValueError(f"{path} is {kind}, which cannot hold {LAYOUTS[found]}")
    if found == "folder":
        opened: Layout = TextBeside(path, source.prompt)
        if not len(opened):
            raise ValueError(f"{path}: no pictures in it ({', '.join(SUFFIXES)})")
        return opened
    if found == "csv":
        return CsvCaptions(path, source.pictures(), source.prompt)
    if found == "finevision":
        return FineVision(path, fix_image_count=source.fix_image_count)
    if found == "own":
        images = [source.images_path] if source.images_path else []
        fix = source.fix_image_count
        return OwnRecords(Sources([path], images, fix_image_count=fix, flag="SOURCE"))
    return _open_json(source, found)


def _recognise(path: Path) -> str:
    """The layout of a source by its suffix, and its columns or fields."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return "own" if is_saved_dataset(path) else "folder"
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix in (*LINES_SUFFIXES, ".tar", ".arrow"):
        return "own"
    if suffix in PARQUET_SUFFIXES:
        columns = _columns(path)
        if {"images", "texts"} <= set(columns):
            return "finevision"
        if set(columns) & set(TURN_FIELDS):
            return "own"
        raise ValueError(
            f"{path}: columns {columns[:12]} are of no layout that is known; {_known()}"
        )
    if suffix == ".json":
        arrays = index_arrays(path)
        if None in arrays:
            return "llava"
        if "questions" in arrays:
            return "vqa"
        if {"images", "annotations"} <= set(arrays):
            return "coco"
        if set(arrays) & set(TURN_FIELDS):  # of the first record, a record a line
            return "own"
        fields = [str(name)[:40] for name in list(arrays)[:12]]
        raise ValueError(f"{path}: an object with arrays {fields} is of no layout; {_known()}")
    raise ValueError(f"{path}: its suffix says no layout that is known; {_known()}")


def _known() -> str:
    return "known are " + "; ".join(LAYOUTS.values())


def _columns(path: Path) -> list[str]:
    from dataset.records.parquet_pages import ParquetPages  # pyarrow is slow to import

    return list(ParquetPages(path).schema.names)


def _open_json(source: Source, layout: str) -> Layout:
    arrays = index_arrays(source.path)
    if layout == "llava":
        elements, fix = _array(arrays, None, source.path), source.fix_image_count
        return ShareGpt(elements, source.pictures(), fix_image_count=fix)
    if layout == "coco":
        names = _file_names(_array(arrays, "images", source.path))
        captions = _array(arrays, "annotations", source.path)
        return CocoCaptions(captions, source.pictures(), names, source.prompt)
    questions = _array(arrays, "questions", source.path)
    if source.annotations is None:
        raise ValueError(f"{source.path} has questions; name the file of answers by --annotations")
    if not source.annotations.is_file():
        raise FileNotFoundError(f"there is no file {source.annotations}; see --annotations")
    answers = _array(index_arrays(source.annotations), "annotations", source.annotations)
    places = {key: place for place, key in enumerate(_values(answers, "question_id"))}
    return Vqa(questions, source.pictures(), answers, places)


def _array(arrays: dict[str | None, JsonArray], name: str | None, path: Path) -> JsonArray:
    if name not in arrays:
        what = "no JSON array" if name is None else f"no array {name!r} in it"
        raise ValueError(f"{path}: {what}, only {[str(n)[:40] for n in arrays]}")
    return arrays[name]


def _values(elements: JsonArray, field: str) -> list[Any]:
    """A field of every element; None where it has none, or is broken."""
    found: list[Any] = []
    for index in range(len(elements)):
        try:
            value = elements[index].get(field)
        except (ValueError, AttributeError):
            value = None
        found.append(value if isinstance(value, int | str) else None)
    return found


def _file_names(images: JsonArray) -> dict[Any, str]:
    """The file of each of COCO's pictures by its id."""
    pairs = zip(_values(images, "id"), _values(images, "file_name"), strict=True)
    return {key: name for key, name in pairs if key is not None and isinstance(name, str)}
