"""Owns opening a data file by its suffix, and the default paths of the published data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dataset.records.data_file import check_file
from dataset.records.jsonl import JsonlRecords

if TYPE_CHECKING:
    from dataset.records.parquet import ParquetRecords

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


def open_records(data_path: Path, images_path: Path | None) -> JsonlRecords | ParquetRecords:
    """Open a data file by its suffix.

    Raises:
        FileNotFoundError: the file or its images are missing.
        ValueError: not a regular file, unreadable, or without a record.
    """
    check_file(data_path, what="data file", flag="--data_path")
    if data_path.suffix == ".parquet":
        from dataset.records.parquet import ParquetRecords  # pyarrow is slow to import

        return ParquetRecords(data_path)
    return JsonlRecords(data_path, images_path)
