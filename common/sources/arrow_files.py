"""Reads rows from .arrow files, in Arrow's stream format and its file format, and from folders of save_to_disk."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.recipe import Kind, UserError
from common.sources.arrow_rows import BATCH_ROWS, table_rows
from common.sources.source_row import PlacedRow

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset


def arrow_rows(
    path: Path, unread: Counter[str], columns: dict[str, str] | None = None, kind: Kind | None = "conversations"
) -> Iterator[PlacedRow]:
    """Yields the rows of an .arrow file, with the columns that its format reads. For `unread` see table_rows."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            for number, row in table_rows(str(path), _batches(file), unread, columns, kind):
                yield f"{path}, row {number}", row
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: a column's name that is no text
        if getattr(error, "errno", None) is not None:  # of the system; Arrow's own OSErrors have none
            raise
        raise UserError(f"{path} is not a readable Arrow file: {str(error).splitlines()[0]}") from error


def _batches(file: "pyarrow.NativeFile") -> Iterator["pyarrow.RecordBatch"]:
    """The record batches of a file, cut where they are large."""
    import pyarrow

    try:
        reader = pyarrow.ipc.open_file(file)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    except pyarrow.ArrowInvalid:  # it does not end as the file format does
        file.seek(0)
        batches = iter(pyarrow.ipc.open_stream(file))
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def saved_rows(
    folder: Path,
    split: str,
    unread: Counter[str],
    columns: dict[str, str] | None = None,
    kind: Kind | None = "conversations",
) -> Iterator[PlacedRow]:
    """Yields the rows of a data set that save_to_disk wrote; of one with splits, those of `split`.

    Raises UserError where it has no such split, or cannot be read.
    """
    import datasets
    import pyarrow

    try:
        if (folder / "dataset_dict.json").exists():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise UserError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
            folder = folder / split
        rows = datasets.load_from_disk(str(folder))
        yield from dataset_rows(rows, str(folder), unread, columns, kind)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} is no readable data set of save_to_disk: {reason}") from error


def dataset_rows(
    rows: "Dataset",
    name: str,
    unread: Counter[str],
    columns: dict[str, str] | None = None,
    kind: Kind | None = "conversations",
) -> Iterator[PlacedRow]:
    """Yields the rows of a data set, each with its place. Pictures and sounds are not decoded."""
    tables = rows.with_format("arrow").iter(batch_size=BATCH_ROWS)
    batches = (batch for table in tables for batch in table.to_batches())
    for number, row in table_rows(name, batches, unread, columns, kind):
        yield f"{name}, row {number}", row
