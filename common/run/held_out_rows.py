"""The rows that a run held out, kept in its folder: what was never trained on is a fact of the run.

Drawn again later from a file that has changed since, other rows would be called held out, and have been trained on.
"""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset

from common.machine.disk import remove, replace_atomically
from common.recipe import UserError
from common.run.folder import HELD_OUT_ROWS, SAVING
from common.sources.fingerprint import source_state


def save_held_out_rows(rows: Dataset, folder: Path) -> None:
    """Writes packed rows (Rows.evaluation) as tokens into the run's folder, whole or not at all."""
    aside = folder / SAVING
    aside.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(rows.with_format("arrow")[:], aside / HELD_OUT_ROWS)
    replace_atomically(aside / HELD_OUT_ROWS, folder / HELD_OUT_ROWS)
    remove(aside)


def has_changed(source: dict[str, Any]) -> bool:
    """Whether the files are others than the run read. False where one is not there, or they were not hashed.

    source: an entry of run.json's "data".
    """
    before = source.get("sha256")
    now = source_state(source["source"]) if before is not None else None
    return now is not None and now.sha256 != before


def load_held_out_rows(folder: Path) -> Dataset | None:
    """The packed rows that the run in this folder held out; None where it held none out.

    Raises UserError when the file is damaged.
    """
    path = folder / HELD_OUT_ROWS
    if not path.exists():
        return None
    try:
        return Dataset(pyarrow.parquet.read_table(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is damaged ({error}); name rows to evaluate on: DATA=held_out.jsonl") from error
