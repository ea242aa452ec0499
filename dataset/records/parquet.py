"""Owns records of a Parquet file, in the published layout and in those of other writers."""

from pathlib import Path
from typing import Any

from dataset.records.columns import ColumnRecords
from dataset.records.data_file import NO_RECORDS
from dataset.records.parquet_pages import HELD_BYTES, Held, ParquetPages


class ParquetRecords(ColumnRecords):
    """Records of a Parquet file; the published layout has `conversations` (JSON) and
    `image_bytes`.

    Args:
        held: the unpacked pages that are kept, of several files that are read together.
    Raises:
        ValueError: not a readable Parquet file of records.
    """

    def __init__(
        self,
        data_path: Path,
        images_path: Path | None = None,
        *,
        fix_image_count: bool = False,
        held: Held | None = None,
    ):
        self._pages = ParquetPages(data_path, held=held)
        types = {field.name: field.type for field in self._pages.schema}
        super().__init__(data_path, images_path, types, fix_image_count=fix_image_count)
        if not len(self):
            raise ValueError(f"{data_path}: {NO_RECORDS}")

    def __len__(self) -> int:
        return self._pages.num_rows

    def _cell(self, column: str, index: int) -> Any:
        return self._pages.value(column, index)

    @property
    def slowness(self) -> str | None:  # type: ignore[override]  # found out when asked for
        """Why records are slow to read in random order, and what to do about it; None: they are
        not."""
        sizes = [
            size
            for name in self.image_fields
            if name in self.types
            for size in self._pages.dictionary_sizes(name)
        ]
        size = sum(sizes)
        if size <= HELD_BYTES or len(sizes) == 1:
            return None
        return (
            f"{self.data_path.name}: the dictionaries of its pictures take {size / 2**20:.0f} MiB "
            f"and {HELD_BYTES / 2**20:.0f} are kept, so reading in random order is slow; write "
            "the file again by pyarrow.parquet.write_table(..., use_dictionary=False)"
        )
