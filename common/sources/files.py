"""Reads the rows of a source, files or a data set of the hub, each with the place it comes from."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.recipe import Kind, UserError
from common.sources.arrow_files import arrow_rows, saved_rows
from common.sources.csv_files import csv_rows
from common.sources.document_files import document_rows
from common.sources.hub_rows import hub_rows
from common.sources.json_files import json_rows, jsonl_rows
from common.sources.parquet_files import parquet_rows
from common.sources.source_files import find_files, is_file, kind_of
from common.sources.source_row import PlacedRow
from common.sources.unpacking import is_compressed

# By the suffix of a file's name. Readers of rows give all that a row has; those of tables the columns of the format.
ROW_READERS = {".jsonl": jsonl_rows, ".json": json_rows, ".txt": document_rows}
TABLE_READERS = {".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows, ".arrow": arrow_rows}


def read_rows(
    source: str,
    *,
    split: str = "train",
    revision: str | None = None,
    config: str | None = None,
    columns: dict[str, str] | None = None,
    kind: Kind | None = "conversations",
    unread: Counter[str] | None = None,
) -> Iterator[PlacedRow]:
    """Yields every row of a source's files, or of a hub data set's split, in order. A row with a fault is a BadRow.

    config: of a hub data set, where it has several configurations. columns and kind: DataSpec's; kind None reads any.
    unread: is added to how many rows have a value in each column that the rows come without, because no format reads
    it; of a Parquet file's lists the most that there can be.

    Raises UserError when the source as a whole cannot be read.
    """
    unread = Counter() if unread is None else unread
    if not is_file(source):
        yield from hub_rows(source, split, revision, config, unread, columns, kind)
        return
    found = find_files(source)
    if found.saved is not None:
        yield from saved_rows(found.saved, split, unread, columns, kind)
        return
    readers = {path: kind_of(path) for path in found.files}  # before the first file is read
    for path, suffix in readers.items():
        yield from _rows_of(path, suffix, unread, columns, kind)


def _rows_of(
    path: Path, suffix: str, unread: Counter[str], columns: dict[str, str] | None, kind: Kind | None
) -> Iterator[PlacedRow]:
    try:
        if suffix in ROW_READERS:
            yield from ROW_READERS[suffix](path)
        else:
            yield from TABLE_READERS[suffix](path, unread, columns, kind)
    except OSError as error:
        if error.errno is None and is_compressed(path):  # which is how Arrow says that it cannot unpack
            raise UserError(f"{path} is damaged ({error}); download it again, or pack it again") from error
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
