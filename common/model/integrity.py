"""Refuses weights that are missing, pickled, cut short or damaged, before anything is loaded."""

import contextlib
import re
from pathlib import Path

from common.machine.disk import format_bytes, sha256_of
from common.machine.slow_work import report_slow_work
from common.model.safetensors_files import INDEX, list_files, read_header
from common.recipe import UserError

VERIFIED_NOTES = Path(".cache") / "checked"  # an empty file for each blob whose sha256 was right


def check_safetensors(folder: Path) -> None:
    """Raises UserError unless the folder's weights are complete safetensors files, and as the hub has them."""
    index = folder / INDEX
    try:
        files = list_files(folder)
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {error}; download it again") from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing and not index.exists():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise UserError(
                f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are opened; "
                "take a model with safetensors, or convert it: https://huggingface.co/spaces/safetensors/convert"
            )
        raise UserError(f"{folder} has no weights: there is no model.safetensors and no model.safetensors.index.json")
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(files)} weight files, first {missing[0]}")
    for file in files:
        check_complete(folder / file)
        _check_content(folder / file)


def check_complete(path: Path) -> None:
    """Raises UserError unless the file is as long as its safetensors header says."""
    size = path.stat().st_size
    again = "delete it and download it again"
    try:
        start, entries = read_header(path)
        data_bytes = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except EOFError as error:
        raise UserError(f"{path} is cut short: {size:,} bytes, less than its header; {again}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file, or its header is damaged; {again}") from error
    expected = start + data_bytes
    if size != expected:
        raise UserError(f"{path} is cut short or damaged: {size:,} bytes instead of {expected:,}; {again}")


def _check_content(path: Path) -> None:
    """Raises UserError unless a file in the hub's cache has the sha256 that the hub gave it as its name.

    Each file is read once, at a GiB a second or so; a note in VERIFIED_NOTES saves the second time.
    """
    blob = path.resolve()
    if not path.is_symlink() or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    status = blob.stat()
    note = VERIFIED_NOTES / f"{blob.name}-{status.st_size}-{status.st_mtime_ns}"
    if note.exists():
        return
    with report_slow_work(f"checking {path.name} ({format_bytes(status.st_size)}), once"):
        sha256 = sha256_of(blob)
    if sha256 != blob.name:
        raise UserError(f"{path} is damaged: it is not what the hub has. Delete {blob} and run again")
    with contextlib.suppress(OSError):  # without the note the file is checked again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
