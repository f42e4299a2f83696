"""Rows from tables of Arrow, which Parquet files, .arrow files and data sets of the hub all are in memory."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from common.recipe import Kind, UserError
from common.sources.formats import WANTED_KEYS, is_media, match_keys, quoted
from common.sources.json_files import parse_json
from common.sources.source_row import BadRow, Row

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024


def find_columns(
    source: str, names: tuple[str, ...], columns: dict[str, str] | None, kind: Kind | None
) -> dict[str, int]:
    """From each key of the table's format to the place of its column, but for pictures and sounds.

    Raises UserError when there is no such format.
    """
    try:
        matched = match_keys(names, columns, kind)
    except BadRow as fault:
        raise UserError(f"{source}: its columns: {fault}") from fault
    if matched is None:
        raise UserError(f"{source}: no format has its columns: {quoted(names)}; name them {WANTED_KEYS[kind]}")
    return {key: place for key, place in matched.places.items() if not is_media(names[place])}


def table_rows(
    source: str,
    batches: Iterator["pyarrow.RecordBatch"],
    unread: Counter[str],
    columns: dict[str, str] | None,
    kind: Kind | None,
) -> Iterator[tuple[int, Row | BadRow]]:
    """Yields the rows of a table with their numbers, from 1 on, with the columns that its format reads.

    Adds to `unread` how many rows have a value in each of the other columns. Raises UserError when the format of the
    columns is not known, or when a column for pictures or sounds has a value; pyarrow.ArrowInvalid for a damaged batch.
    """
    number = 0
    for batch in batches:
        if not batch.num_rows:
            continue
        places = find_columns(source, tuple(batch.schema.names), columns, kind)
        for place, name in enumerate(batch.schema.names):
            if place not in places.values() and (count := count_filled(batch.column(place))):
                add_unread(source, name, count, unread)
        for place in places.values():
            batch.column(place).validate(full=True)  # Arrow trusts the offsets in a file, and reads where they point
        for row in batch_rows(batch, places):
            number += 1
            yield number, row


def add_unread(source: str, name: str, count: int, unread: Counter[str]) -> None:
    """Adds `count` rows that have a value in a column which no format reads.

    Raises UserError where that is a column of pictures or sounds: the text beside them is about them.
    """
    if is_media(name):
        raise UserError(
            f"{source} has values in its column {name!r}, and only text can be trained: leave out the rows that have "
            "one, then the column"
        )
    unread[name] += count


def count_filled(array: "pyarrow.Array") -> int:
    """How many values of a column are neither null nor an empty text, list or map. Reads no more than their lengths."""
    import pyarrow
    import pyarrow.compute

    kind = array.type
    if pyarrow.types.is_map(kind):
        array = array.cast(pyarrow.list_(pyarrow.struct([("key", kind.key_type), ("value", kind.item_type)])))
    if pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type):
        lengths = pyarrow.compute.list_value_length(array)
    elif pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_binary(kind):
        lengths = pyarrow.compute.binary_length(array)
    else:
        return len(array) - array.null_count
    return pyarrow.compute.sum(pyarrow.compute.greater(lengths, 0)).as_py() or 0


def batch_rows(batch: "pyarrow.RecordBatch", places: dict[str, int]) -> Iterator[Row | BadRow]:
    """The rows of a batch, with the columns at these places. A row with a value that cannot be read is a BadRow."""
    import pyarrow

    arrays = [batch.column(place) for place in places.values()]
    decode = {key: _decoder(array.type) for key, array in zip(places, arrays, strict=True)}
    decoders = {key: decoder for key, decoder in decode.items() if decoder is not None}
    arrays = [array.cast(_without_times(array.type)) for array in arrays]
    for row in _rows(pyarrow.RecordBatch.from_arrays(arrays, names=list(places))):
        try:
            if isinstance(row, dict):
                row |= {key: decoder(row[key]) for key, decoder in decoders.items()}
            yield row
        except BadRow as fault:
            yield fault


def _decoder(kind: "pyarrow.DataType") -> Callable[[Any], Any] | None:
    """What makes a value of this type whole, where parts of it are JSON in a text; None where no part is.

    datasets writes fields of mixed types so (its feature Json, Arrow's extension arrow.json): a text has quotes then.
    """
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return lambda value: None if value is None else parse_json(value)
    if pyarrow.types.is_struct(kind):
        found = {field.name: _decoder(field.type) for field in kind}
        parts = {name: decoder for name, decoder in found.items() if decoder is not None}
        if parts:
            return lambda value: value and value | {name: decoder(value[name]) for name, decoder in parts.items()}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        if (decoder := _decoder(kind.value_type)) is not None:
            return lambda value: value and [decoder(part) for part in value]
    return None


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
