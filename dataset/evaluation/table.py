"""Owns the rows of a table: TSV as pandas writes it, Parquet, and JSON lines."""

import csv
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO, Any

from dataset.records.conversation import parse_json
from dataset.records.data_file import check_file, check_text

MAX_CELL = 1 << 30  # a picture in base64 is one cell
ROWS_AT_ONCE = 16
Row = dict[str | None, Any]  # None: the cells that are more than the columns


class Table:
    """A table, read from its beginning each time it is iterated; a row is a dictionary.

    Args:
        flag: that names the path, as errors say it.
    Raises:
        FileNotFoundError: no such file.
        ValueError: of another kind, or unreadable.
    """

    def __init__(self, path: Path, *, flag: str):
        self.path = path
        readers = {
            ".tsv": self._tsv_rows,
            ".parquet": self._parquet_rows,
            ".jsonl": self._json_rows,
            ".json": self._json_rows,
        }
        check_file(path, what="multiple-choice file", flag=flag)
        if path.suffix not in readers:
            raise ValueError(f"{flag} {path}: expected a .tsv or .parquet file, or .jsonl")
        self._rows = readers[path.suffix]
        self.columns = self._columns()

    def __iter__(self) -> Iterator[Row]:
        return self._rows()

    def _columns(self) -> list[str]:
        if self.path.suffix == ".tsv":
            return next(self._tsv_cells(), [])
        if self.path.suffix != ".parquet":
            return [name for name in next(self._json_rows(), {}) if name is not None]
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_schema(self.path).names
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{self.path}: not a readable Parquet file ({error})") from None

    def _tsv_rows(self) -> Iterator[Row]:
        rows = self._tsv_cells()
        columns = next(rows)
        for cells in filter(None, rows):
            row = dict(zip_longest(columns, cells[: len(columns)]))
            yield row | {None: cells[len(columns) :]}  # as `csv.DictReader` has it

    def _tsv_cells(self) -> Iterator[list[str]]:
        """The cells of each row, the header first; quoted as `pandas.DataFrame.to_csv` does, so
        that a cell may contain tabs and line breaks.

        Raises:
            ValueError: names the line that is no TSV, or has an unclosed quote that swallows rows.
        """
        csv.field_size_limit(MAX_CELL)
        with self._open_tsv() as file:
            reader = csv.reader(self._whole_lines(file), delimiter="\t", strict=True)
            num_columns, line = None, 1
            try:
                for cells in reader:
                    num_columns = num_columns or len(cells)
                    self._check_quotes(cells, num_columns, line=line)
                    yield cells
                    line = reader.line_num + 1
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path}: not a readable TSV file in UTF-8 ({error})"
                ) from None
            except csv.Error as error:
                raise ValueError(self._wrong_quote(line, error)) from None

    def _open_tsv(self) -> IO[str]:
        return open(self.path, encoding="utf-8-sig", newline="")

    def _whole_lines(self, file: Iterable[str]) -> Iterator[str]:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise ValueError(
                    f"{self.path}:{number}: holds a NUL character, so it is damaged or UTF-16; "
                    "save it in UTF-8"
                )
            yield line

    def _check_quotes(self, cells: list[str], num_columns: int, *, line: int) -> None:
        """Raise if an unclosed quote has swallowed rows.

        Then a cell spans several lines and has as many tabs as a row, or, where the quote ends in
        another column, the row has another number of cells.
        """
        for cell in cells:
            num_tabs = cell.count("\t")
            has_rows = "\n" in cell and num_tabs >= num_columns - 1
            if has_rows or (num_tabs and len(cells) != num_columns):
                raise ValueError(self._wrong_quote(line, "it swallows what follows"))

    def _wrong_quote(self, line: int, reason: str | csv.Error) -> str:
        with self._open_tsv() as file:
            text = next(islice(file, line - 1, None))
        return (
            f"{self.path}:{line}: a cell of this row begins with a quote but does not end with one "
            f"({reason}): {text[:80]!r}; double the quotes inside a cell, and put one at both of "
            "its ends, as pandas writes them"
        )

    def _parquet_rows(self) -> Iterator[Row]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(ROWS_AT_ONCE):
                    yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self.path}: a damaged Parquet file ({error})") from error

    def _json_rows(self) -> Iterator[Row]:
        check_text(self.path)
        with open(self.path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = parse_json(line, where=f"{self.path.name}:{number}")
                if not isinstance(row, dict):
                    raise ValueError(f"{self.path}:{number}: expected a JSON object on each line")
                yield row
