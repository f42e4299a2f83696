"""Reads rows from Parquet files: the columns of the format alone, whatever the others hold."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.formats import WANTED_KEYS, match_keys
from common.data.source_row import BadRow, PlacedRow, Row
from common.recipe import UserError

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024


def parquet_rows(path: Path) -> Iterator[PlacedRow]:
    """Yields the rows of a Parquet file, with the columns that its format reads."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                return
            columns = _find_columns(path, tuple(file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns.values())):
                arrays = [batch.column(name) for name in columns.values()]
                arrays = [array.cast(_without_times(array.type)) for array in arrays]
                for row in _rows(pyarrow.RecordBatch.from_arrays(arrays, names=list(columns))):
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _find_columns(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    """From each key of the file's format to the name of its column. Raises UserError when there is no such format."""
    try:
        matched = match_keys(names)
    except BadRow as fault:
        raise UserError(f"{path}: its columns: {fault}") from fault
    if matched is None:
        shown = ", ".join(f"{name!r:.40}" for name in names[:8])
        raise UserError(f"{path}: no format has its columns: {shown}; name them {WANTED_KEYS}")
    return {key: names[place] for key, place in matched.places.items()}


def _without_times(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    """The type with integers in place of dates and times, also in a message's other fields.

    No format reads them, and Python cannot hold all that Parquet can: the year 10000, or a time zone of its own.
    """
    import pyarrow

    if pyarrow.types.is_temporal(kind):
        return pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([field.with_type(_without_times(field.type)) for field in kind])
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_without_times(kind.value_type)))
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_without_times(kind.value_type)))
    return kind


def _rows(batch: "pyarrow.RecordBatch") -> list[Row | BadRow]:
    """The rows of a batch. A row with a value that cannot be read is a BadRow."""
    try:
        return list(batch.to_pylist())
    except (ValueError, ArithmeticError, LookupError):
        return [_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row(batch: "pyarrow.RecordBatch") -> Row | BadRow:
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("a value that is not UTF-8")
    except (ValueError, ArithmeticError, LookupError) as error:
        return BadRow(f"a value that cannot be read: {str(error).splitlines()[0]:.80}")
    return row
