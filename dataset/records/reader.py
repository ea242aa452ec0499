"""Owns opening data files of any layout, and the default paths of the published data."""

import codecs
import glob
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dataset.records.address import Address, StreamOptions, check_no_address
from dataset.records.base import Records
from dataset.records.data_file import HEAD_BYTES, check_file, check_text
from dataset.records.json_array import JsonArrayRecords
from dataset.records.jsonl import JsonlRecords
from dataset.records.layout import LAYOUTS
from dataset.records.mixing import MixedRecords, Mixture
from dataset.records.shards import ShardedRecords
from dataset.records.webdataset import TarRecords

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
SUFFIXES = (*PARQUET_SUFFIXES, ".arrow", ".tar", ".jsonl", ".ndjson", ".json")  # in a folder
PACKED_SUFFIXES = (".jsonl.gz", ".ndjson.gz", ".json.gz")  # read as streams alone
DATASETS_FILES = ("state.json", "dataset_dict.json")  # of datasets.save_to_disk
NOT_RECORDS = (*DATASETS_FILES, "dataset_info.json", "dataset_infos.json")
SPLIT_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}\.")
DATASET_DIR = Path(__file__).resolve().parents[1]
DEFAULT_FILES = {
    "pretrain": (("pretrain_data", "pretrain_vlm_data", "pretrain_i2t"), "pretrain_images"),
    "sft": (("sft_data", "sft_vlm_data", "sft_i2t"), "sft_images"),
    "multi": (("sft_vlm_data_multi",), "sft_multi_images_trans_image"),
}


def default_data_paths(kind: str) -> tuple[Path, Path]:
    """Data file and image folder of "pretrain", "sft" or "multi": the first that exists.

    Raises:
        FileNotFoundError: none exists; says where data is expected.
    """
    names, images = DEFAULT_FILES[kind]
    for name in names:
        for suffix in (".jsonl", ".parquet"):
            path = DATASET_DIR / (name + suffix)
            if path.is_file():
                return path, DATASET_DIR / images
    raise FileNotFoundError(
        f"no training data: expected {DATASET_DIR / names[0]}.jsonl with its images in "
        f"{DATASET_DIR / images}; fetch it by `python dataset/download.py`, or name other files by "
        "--data_path and --images_path"
    )


def open_records(
    data_path: Path | Address | Mixture,
    images_path: Path | None,
    *,
    fix_image_count: bool = False,
    stream: StreamOptions | None = None,
) -> Records:
    """Open a data file, a folder of them, a pattern such as `data/*.parquet`, the address of shards
    on another machine, or a mixture.

    Args:
        images_path: folder or zip in which names of pictures are looked up.
        fix_image_count: drop `<image>` tags for which a record has no picture.
        stream: how shards on other machines are read.
    Raises:
        FileNotFoundError: the file or its images are missing.
        ValueError: not a regular file, unreadable, or without a record.
    """
    options: dict[str, Any] = {"images_path": images_path, "fix_image_count": fix_image_count}
    if isinstance(data_path, Mixture):
        stream = replace(stream or StreamOptions(), num_streams=max(1, data_path.num_streams))
        read_source = partial(open_records, **options, stream=stream)
        return MixedRecords(data_path, read_source, seed=stream.seed)
    if isinstance(data_path, Address):
        from dataset.records.parquet_pages import Held
        from dataset.records.streams.records import StreamRecords  # fsspec is slow to import

        read = partial(_open_shard, held=Held(), **options)
        return StreamRecords(data_path, images_path, stream or StreamOptions(), read)
    check_no_address(data_path)
    if data_path.is_dir() and any((data_path / name).is_file() for name in DATASETS_FILES):
        return _open_file(data_path, **options)
    paths = find_files(data_path)
    if paths[0].suffix.lower() in PARQUET_SUFFIXES:
        from dataset.records.parquet_pages import Held

        options["held"] = Held()  # one for all files
    return ShardedRecords(data_path, paths, partial(_open_file, **options))


def find_files(data_path: Path) -> list[Path]:
    """The data files that a path names: itself, those of a folder, or those of a pattern.

    Raises:
        FileNotFoundError: there is none. ValueError: they are of several kinds or splits.
    """
    if data_path.is_dir():
        paths = _files_of(data_path)
    elif is_pattern(data_path):
        found = (Path(name) for name in glob.glob(str(data_path), recursive=True))
        paths = sorted(path for path in found if path.is_file())
        if not paths:
            raise FileNotFoundError(f"no data file matches {data_path}; see --data_path")
    else:
        check_file(data_path, what="data file", flag="--data_path")
        return [data_path]
    kinds = Counter(path.suffix.lower() for path in paths)
    if len(kinds) > 1:
        found_kinds = ", ".join(f"{count} {suffix}" for suffix, count in kinds.items())
        raise ValueError(
            f"{data_path} holds {found_kinds}; name those to read by a pattern such as "
            f"'{data_path / ('*' + next(iter(kinds)))}'"
        )
    return paths


def is_pattern(path: Path) -> bool:
    """Whether a path is no file but a pattern for the names of some."""
    return not path.exists() and bool(set(str(path)) & set("*?["))


def list_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The data files in a folder, or if there are none, in the folders in it; perhaps none."""
    for pattern in ("*", "*/*"):
        paths = sorted(
            path
            for path in folder.glob(pattern)
            if path.suffix.lower() in suffixes
            and path.name not in NOT_RECORDS
            and not path.name.startswith((".", "_"))
            and path.is_file()
        )
        if paths:
            return paths
    return []


def _files_of(folder: Path) -> list[Path]:
    paths = list_files(folder)
    if not paths:
        seen = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{folder} is a folder that holds no data file (in it: {seen}); what can be read: "
            f"{LAYOUTS}"
        )
    splits = {match[1] for path in paths if (match := SPLIT_NAME.match(path.name))}
    if len(splits) > 1:
        raise ValueError(
            f"{folder} holds the splits {', '.join(sorted(splits))}; name one by a pattern such as "
            f"'{paths[0].with_name(min(splits) + '-*' + paths[0].suffix)}'"
        )
    return paths


def _open_file(path: Path, images_path: Path | None, **options: Any) -> Records:
    """Open one file, or a folder of `datasets`, by its suffix and first character."""
    suffix = path.suffix.lower()
    if suffix in PARQUET_SUFFIXES:
        from dataset.records.parquet import ParquetRecords  # pyarrow is slow to import

        return ParquetRecords(path, images_path, **options)
    if suffix == ".arrow" or path.is_dir():
        from dataset.records.arrow import ArrowRecords

        return ArrowRecords(path, images_path, **options)
    if suffix == ".tar":
        return TarRecords(path, images_path, **options)
    if path.name.lower().endswith(PACKED_SUFFIXES):
        raise ValueError(
            f"{path} is compressed; unpack it by `gunzip -k`, or name it to the training stages "
            f"with images by its address, file://{path.resolve()}"
        )
    check_text(path)
    reader = JsonArrayRecords if is_json_array(path) else JsonlRecords
    return reader(path, images_path, **options)


def _open_shard(path: Path, *, held: Any, **options: Any) -> Records:
    """As `_open_file`; Parquet files share what they keep."""
    is_parquet = path.suffix.lower() in PARQUET_SUFFIXES
    return _open_file(path, **options, **({"held": held} if is_parquet else {}))


def is_json_array(path: Path) -> bool:
    """Whether a file is a JSON array of records rather than a record a line.

    Raises:
        ValueError: a `.json` that is neither.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    first_line, _, _ = head.partition(b"\n")
    is_json = path.suffix.lower() == ".json"
    if head.startswith(b"["):
        return is_json or first_line.strip() == b"[" or head[1:].lstrip().startswith(b"{")
    if is_json and len(first_line) < len(head) and not _is_object(first_line):
        raise ValueError(
            f"{path} is neither a JSON array of records nor a record a line; what can be read: "
            f"{LAYOUTS}"
        )
    return False


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
