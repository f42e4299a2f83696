"""The rows that a run held out, kept in its folder: what was never trained on is a fact of the run.

Drawn again later from a file that has changed since, other rows would be called held out, and have been trained on.
"""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset

from common.machine.disk import remove, replace_atomically, sha256_of
from common.machine.paths import local_path
from common.recipe import UserError
from common.run.folder import HELD_OUT_ROWS, SAVING


def save_held_out_rows(rows: Dataset, folder: Path) -> None:
    """Writes packed rows (Rows.evaluation) as tokens into the run's folder, whole or not at all."""
    aside = folder / SAVING
    aside.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(rows.with_format("arrow")[:], aside / HELD_OUT_ROWS)
    replace_atomically(aside / HELD_OUT_ROWS, folder / HELD_OUT_ROWS)
    remove(aside)


def has_changed(source: dict[str, Any]) -> bool:
    """Whether a file is another one than the run read. False where it is not there, or was not hashed.

    source: an entry of run.json's "data".
    """
    path, before = local_path(source["source"]), source.get("sha256")
    return before is not None and path.is_file() and sha256_of(path) != before


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
