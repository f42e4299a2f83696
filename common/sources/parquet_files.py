"""Reads rows from Parquet files: the columns of the format alone, whatever the others hold."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.recipe import Kind, UserError
from common.sources.arrow_rows import BATCH_ROWS, add_unread, batch_rows, count_filled, find_columns
from common.sources.source_row import PlacedRow

if TYPE_CHECKING:
    import pyarrow.parquet


def parquet_rows(
    path: Path, unread: Counter[str], columns: dict[str, str] | None = None, kind: Kind | None = "conversations"
) -> Iterator[PlacedRow]:
    """Yields the rows of a Parquet file, with the columns that its format reads.

    Adds to `unread` how many rows have a value in each of the other columns. Raises UserError where one of them has
    pictures or sounds.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                return
            names = tuple(file.schema_arrow.names)
            places = find_columns(str(path), names, columns, kind)
            for name in {name: None for place, name in enumerate(names) if place not in places.values()}:
                if count := _count_filled_rows(file, name):
                    add_unread(str(path), name, count, unread)
            wanted = [names[place] for place in places.values()]
            number = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                there = batch.schema.names
                for row in batch_rows(batch, {key: there.index(names[place]) for key, place in places.items()}):
                    number += 1
                    yield f"{path}, row {number}", row
    except (ValueError, pyarrow.ArrowException) as error:  # ValueError: a column's name that is no text
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _count_filled_rows(file: "pyarrow.parquet.ParquetFile", name: str) -> int:
    """How many rows have a value in a column: from the file's statistics, without the column; of lists at most.

    A file without statistics is read.
    """
    leaves = [place for place in range(len(file.schema)) if _column_of_leaf(file, place) == name]
    count = 0
    for number in range(file.metadata.num_row_groups):
        group, filled = file.metadata.row_group(number), 0
        for leaf in map(group.column, leaves):
            if leaf.statistics is None or not leaf.statistics.has_null_count:
                batches = file.iter_batches(batch_size=BATCH_ROWS, columns=[name])
                return sum(count_filled(batch.column(0)) for batch in batches)
            filled = max(filled, leaf.num_values - leaf.statistics.null_count)
        count += min(group.num_rows, filled)
    return count


def _column_of_leaf(file: "pyarrow.parquet.ParquetFile", place: int) -> str:
    """The column that a leaf of the schema is part of: "images" for "images.list.element.bytes"."""
    path = file.schema.column(place).path
    # A column's own name may have dots.
    return max((name for name in file.schema_arrow.names if f"{path}.".startswith(f"{name}.")), key=len, default="")
