"""Reads rows from JSONL, JSON, CSV and Parquet files, or of hub data sets, each with the place it comes from."""

from collections.abc import Iterator
from pathlib import Path

from common.data.csv_files import csv_rows
from common.data.hub_rows import hub_rows
from common.data.json_files import json_rows, jsonl_rows
from common.data.parquet_files import parquet_rows
from common.data.source_row import PlacedRow
from common.machine.paths import local_path
from common.recipe import UserError

READERS = {".jsonl": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}
SUFFIXES = tuple(READERS)


def is_file(source: str) -> bool:
    """Returns whether a source names a file, which may be missing, and not a hub data set."""
    return local_path(source).exists() or source.lower().endswith(SUFFIXES) or source.startswith((".", "/", "~"))


def read_rows(source: str, *, split: str = "train", revision: str | None = None) -> Iterator[PlacedRow]:
    """Yields every row of a file, or of a hub data set's split, in order. A row that cannot be read is a BadRow.

    Raises UserError when the source as a whole cannot be read.
    """
    if not is_file(source):
        yield from hub_rows(source, split, revision)
        return
    path = local_path(source)
    if path.is_dir():
        raise UserError(f"{source} is a folder; name one {', '.join(SUFFIXES)} file")
    if not path.exists():
        raise UserError(f"there is no data file {path} (looked in {Path.cwd()})")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{source} is not one of {', '.join(SUFFIXES)}; unpack what is compressed or in an archive")
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}") from error
