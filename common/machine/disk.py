"""Large files and folders that are whole or not there: written aside, then renamed."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.recipe import UserError

SPARE_BYTES = 64 << 20  # for the small files beside the large ones
MADE_FROM = "made_from.json"  # in every folder that is written here; what has none is not written over


def format_bytes(size: int) -> str:
    """A number of bytes."""
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"


def refuse_existing(path: Path, *, folder: bool, overwrite: bool) -> None:
    """Raises UserError when `path` exists, unless it may be overwritten and came from here."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists. Replace it: ARGS=--overwrite; or choose another place: TO=...")
    if path.exists() and (path.is_dir() != folder or (folder and not (path / MADE_FROM).exists())):
        raise UserError(f"{path} was not made by this command and is not replaced; choose another place: TO=...")


@contextlib.contextmanager
def written_aside(path: Path, data_bytes: int, *, folder: bool, overwrite: bool) -> Iterator[Path]:
    """A place to write `data_bytes` to, which becomes `path` when all went well, and is removed when not.

    Raises UserError, before anything is written, as refuse_existing, when the disk has too little space, and when
    `path` cannot be made.
    """
    refuse_existing(path, folder=folder, overwrite=overwrite)
    aside = path.with_name(f"{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        free = shutil.disk_usage(path.parent).free
        if data_bytes + SPARE_BYTES > free:
            raise UserError(
                f"{path} would take {format_bytes(data_bytes)}, and {format_bytes(free)} are free there; make room, "
                "or choose another place: TO=..."
            )
        if folder:
            aside.mkdir()
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}") from error
    try:
        yield aside
        if path.exists():
            _remove(path)
        aside.replace(path)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
