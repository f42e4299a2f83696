"""Atomic writes: a file or folder is written under another name beside its own, then renamed into place.

The other name ends in ".writing", or begins with ".removing-" for what is being deleted. A killed process can leave
such a name behind, and never half of a file or folder under its real name.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.machine.lock import LockHeld, hold_lock, refuse_held
from common.machine.write_errors import write_failure, writing
from common.recipe import UserError

WRITING_SUFFIX = ".writing"
REMOVING_PREFIX = ".removing-"
SPARE_BYTES = 64 << 20  # room for the small files beside the large ones
MADE_FROM = "made_from.json"  # is in every folder that a command wrote; a folder without it is never replaced


def fsync(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder. Does nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_atomically(path: Path) -> None:
    """Renames the folder, then removes it: a kill in the middle leaves no half of it under its name.

    Does nothing where there is none.
    """
    if os.path.lexists(path):
        renamed = _name_while_removed(path)
        remove(renamed)
        path.rename(renamed)
        remove(renamed)


def replace_atomically(aside: Path, target: Path, *, durable: bool = False) -> None:
    """Renames `aside` to `target`, on the same disk, with the mode that the umask says. What stood there is replaced.

    A file is replaced in one step. A folder cannot be: the old one is removed first (remove_atomically), so that a
    crash may leave no target, but never a half of one. `durable` calls fsync on the new content before the rename and
    on the parent folder after it: when this returns, a power failure cannot undo it.
    """
    for path in [*aside.iterdir(), aside] if aside.is_dir() else [aside]:
        _let_others_read(path)
        if durable:
            fsync(path)
    if aside.is_dir():
        remove_atomically(target)
    aside.rename(target)
    if durable:
        fsync(target.parent)


def _let_others_read(path: Path) -> None:
    """Gives a file the mode that the umask says: safetensors writes files that nobody else can read."""
    if path.is_file() and not path.is_symlink():
        # The system tells the umask only to who sets it, for all threads. Linux has it in a file as well.
        said = re.search(r"^Umask:\s*(\d+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
        mode = 0o666 & ~int(said[1], 8) if said else None
        with contextlib.suppress(OSError):  # a disk without modes
            if mode is not None and path.stat().st_mode & 0o777 != mode:
                path.chmod(mode)


@contextlib.contextmanager
def write_aside(path: Path, *, folder: bool = False, aside: Path | None = None) -> Iterator[Path]:
    """Yields a path to write to, and renames it to `path` at the end; after an exception removes it instead.

    The yielded path does not exist yet; `folder` makes it an empty folder. What a killed process left there is removed
    first. `aside` names another place, where several processes write at once.
    """
    aside = aside or path.with_name(f"{path.name}{WRITING_SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(aside)
    remove(_name_while_removed(path))
    try:
        if folder:
            aside.mkdir()
        yield aside
        replace_atomically(aside, path)
    finally:
        remove(aside)


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is complete or unchanged. Not for devices and pipes: the rename would replace them."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_named_file(path: Path, text: str) -> None:
    """Writes a UTF-8 file where a user wants it: complete or unchanged, or into a device or a pipe.

    Raises UserError when it cannot be written.
    """
    with writing(path):
        if path.exists() and not path.is_file():  # a rename would replace a device or a pipe
            path.write_text(text, encoding="utf-8")
        else:
            write_text_atomically(path, text)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left in the folder: half-written and half-removed files and folders.

    What cannot be removed stays.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.endswith(WRITING_SUFFIX) or path.name.startswith(REMOVING_PREFIX):
            with contextlib.suppress(OSError):
                remove(path)


def _name_while_removed(path: Path) -> Path:
    return path.with_name(f"{REMOVING_PREFIX}{path.name}")


def format_bytes(size: int) -> str:
    """Bytes as text, in GiB or MiB."""
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"


def refuse_target(path: Path, *, folder: bool, overwrite: bool) -> None:
    """Raises UserError when another command is writing to `path`, and as _refuse_existing.

    For the start of a command that takes long before it writes.
    """
    with _target_lock_in_words(path):
        refuse_held(_lock_file(path))
    _refuse_existing(path, folder=folder, overwrite=overwrite)


def _refuse_existing(path: Path, *, folder: bool, overwrite: bool) -> None:
    """Raises UserError when `path` exists, unless `overwrite` allows to replace it and a command of ours wrote it."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists. Replace it: ARGS=--overwrite; or choose another place: TO=...")
    if path.exists() and (path.is_dir() != folder or (folder and not (path / MADE_FROM).exists())):
        raise UserError(f"{path} was not made by this command and is not replaced; choose another place: TO=...")


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def _target_lock_in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except LockHeld as error:
        raise UserError(
            f"another command is writing to {path} ({error}): wait until it has ended, or choose another place: TO=..."
        ) from error


@contextlib.contextmanager
def write_checked_aside(path: Path, data_bytes: int, *, folder: bool, overwrite: bool) -> Iterator[Path]:
    """write_aside for a large result of a command, whose `data_bytes` must fit on the disk.

    No other process can write to `path` in this way meanwhile. Raises UserError before any data is written: as
    refuse_target, when the disk has too little free space, and when `path` cannot be made; later when a write in the
    block fails.
    """
    refuse_target(path, folder=folder, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _target_lock_in_words(path):
                stack.enter_context(hold_lock(_lock_file(path)))
            _refuse_existing(path, folder=folder, overwrite=overwrite)  # another command may have ended just before
            aside = stack.enter_context(write_aside(path, folder=folder))
            free = shutil.disk_usage(path.parent).free
        except OSError as error:
            raise UserError(f"{path} cannot be made: {error.strerror}; choose another place: TO=...") from error
        if data_bytes + SPARE_BYTES > free:
            raise UserError(
                f"{path} would take {format_bytes(data_bytes)}, and {format_bytes(free)} are free there; make room, "
                "or choose another place: TO=..."
            )
        try:
            yield aside
        except Exception as error:
            if (reason := write_failure(error)) is None:
                raise
            raise UserError(
                f"{path} cannot be written: {reason}; make room, or choose another place: TO=..."
            ) from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
