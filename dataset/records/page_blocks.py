"""Owns which pages of a Parquet column are unpacked together: those that depend on each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Block:
    """Rows of a column that are unpacked together.

    first_row, num_rows: in the row group. group: the row group. start, end: where the pages lie in
    the file, in bytes; 0 and 0 for a column that is not read by pages. num_values: as the headers
    count them. dictionary: where the dictionary's page lies, if they need it.
    """

    first_row: int
    num_rows: int
    group: int
    start: int = 0
    end: int = 0
    num_values: int = 0
    dictionary: tuple[int, int] | None = None

    @property
    def num_bytes(self) -> int:
        """As it lies in the file, with its dictionary."""
        first, last = self.dictionary or (0, 0)
        return self.end - self.start + last - first


@dataclass(frozen=True)
class Page:
    """A data page: where it lies, how many rows begin in it, whether a row from before goes on."""

    start: int
    end: int
    num_values: int
    num_rows: int
    goes_on: bool
    has_dictionary: bool


def blocks_of(
    pages: Sequence[Page], dictionary: tuple[int, int] | None, *, group: int, num_rows: int
) -> Iterator[Block]:
    """The blocks of a row group's pages: those that refer to the dictionary are one, and a row that
    goes on in the next page joins both.

    Raises:
        ValueError: the pages have not as many rows as the row group.
    """
    block: Block | None = None
    first_row = 0
    for page in pages:
        shares_dictionary = page.has_dictionary and block is not None and block.dictionary
        if block is not None and (page.goes_on or shares_dictionary):
            block = replace(
                block,
                num_rows=block.num_rows + page.num_rows,
                end=page.end,
                num_values=block.num_values + page.num_values,
                dictionary=dictionary if page.has_dictionary else block.dictionary,
            )
            continue
        if block is not None:
            yield block
            first_row += block.num_rows
        needed = dictionary if page.has_dictionary else None
        block = Block(
            first_row, page.num_rows, group, page.start, page.end, page.num_values, needed
        )
    if block is not None:
        yield block
        first_row += block.num_rows
    if first_row != num_rows:
        raise ValueError(f"row group {group} ends at row {first_row}, not at {num_rows}")
