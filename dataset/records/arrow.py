"""Owns records of a folder that `datasets.save_to_disk` wrote, and of single Arrow files.

The files are mapped into memory: only what is read is loaded, and all processes share it.
Source: https://huggingface.co/docs/datasets/about_arrow
"""

import itertools
import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import pyarrow

from dataset.records.columns import ColumnRecords
from dataset.records.data_file import NO_RECORDS

STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"


class ArrowRecords(ColumnRecords):
    """Records of a folder of `datasets`, or of one Arrow file (a stream or a file).

    Raises:
        ValueError: it cannot be read, or holds no records.
    """

    def __init__(self, data_path: Path, images_path: Path | None, *, fix_image_count: bool = False):
        self._paths = arrow_files(data_path) if data_path.is_dir() else [data_path]
        self._map_files()
        if not self._batches:
            raise ValueError(f"{data_path}: {NO_RECORDS}")
        types = {field.name: field.type for field in self._batches[0].schema}
        super().__init__(data_path, images_path, types, fix_image_count=fix_image_count)

    def _map_files(self) -> None:
        self._batches = [batch for path in self._paths for batch in map_batches(path)]
        self._starts = [0, *itertools.accumulate(batch.num_rows for batch in self._batches)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_batches": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._map_files()

    def __len__(self) -> int:
        return self._starts[-1]

    def _cell(self, column: str, index: int) -> Any:
        number = bisect_right(self._starts, index) - 1
        batch = self._batches[number]
        return batch.column(column)[index - self._starts[number]].as_py()

    def files(self) -> list[Path]:
        """The files that hold the records, in order."""
        return self._paths


def arrow_files(folder: Path) -> list[Path]:
    """The files of a folder of `datasets`, in the order of their records.

    Raises:
        ValueError: the folder holds several splits, an order of its own, or less than it says.
    """
    if (folder / SPLITS_FILE).is_file():
        splits = sorted(path.name for path in folder.iterdir() if (path / STATE_FILE).is_file())
        example = folder / (splits[0] if splits else "train")
        raise ValueError(f"{folder} holds the splits {', '.join(splits)}; name one, as {example}")
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
        has_order = bool(state.get("_indices_files"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / STATE_FILE} cannot be read ({error}); save it again") from None
    if has_order:
        raise ValueError(
            f"{folder} keeps its order in a file of its own; save it again after "
            "`dataset = dataset.flatten_indices()`"
        )
    return [folder / Path(name).name for name in names]  # nothing outside the folder is opened


def map_batches(path: Path) -> list[pyarrow.RecordBatch]:
    """The batches of an Arrow stream or file, not yet read.

    Raises:
        ValueError: it is neither, or damaged.
    """
    try:
        source = pyarrow.memory_map(str(path))
        try:
            return [batch for batch in pyarrow.ipc.open_stream(source) if batch.num_rows]
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
            return [batch for batch in batches if batch.num_rows]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a readable Arrow file ({str(error).partition(chr(10))[0]})"
        ) from None
