"""Checkpoints on disk that are whole or not there: written aside, synced, hashed and renamed; verified before use.

A killed process leaves the last whole checkpoint and a folder whose name begins with a dot, which the next run removes.
The manifest finds accidents, not an attacker, who could write it anew.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from common.machine.disk import sha256_of

MANIFEST = "manifest.json"
CHECKPOINT_PREFIX = "checkpoint-"
CHECKPOINTS_KEPT = 2  # newest ones
_WRITING, _REMOVING = ".writing", ".removing"


def staging_folder(folder: Path) -> Path:
    """Where a checkpoint of this folder is written before it is whole."""
    return folder / _WRITING


def commit_checkpoint(written: Path, target: Path, run: dict[str, Any]) -> None:
    """The checkpoint at `written` becomes `target`, with a manifest that holds `run` and every file's size and hash.

    When this returns it is on the disk, not only in the system's memory; a crash before leaves `target` as it was.
    """
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(written.iterdir())}
    manifest = written / MANIFEST
    manifest.write_text(json.dumps({"run": run, "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in [*written.iterdir(), written]:
        _sync(path)
    remove_checkpoint(target)
    written.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_checkpoint(checkpoint: Path) -> None:
    """The checkpoint is gone, at once: a kill in the middle leaves no half of it under its name."""
    if checkpoint.exists():
        going = checkpoint.parent / f"{_REMOVING}-{checkpoint.name}"
        shutil.rmtree(going, ignore_errors=True)
        checkpoint.rename(going)
        shutil.rmtree(going)


def remove_unfinished(folder: Path) -> None:
    """Nothing is left of checkpoints that were being written or removed."""
    for path in folder.glob(".*"):
        if path.name.startswith((_WRITING, _REMOVING)):
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, newest first."""
    found = [
        path for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit()
    ]
    return sorted(found, key=lambda path: -int(path.name.removeprefix(CHECKPOINT_PREFIX)))


def keep_newest(folder: Path, kept: int = CHECKPOINTS_KEPT) -> None:
    for old in list_checkpoints(folder)[kept:]:
        remove_checkpoint(old)


def go_back_to(checkpoint: Path) -> None:
    """The checkpoint is the newest of its folder: later ones, which are damaged, are gone, and so are all but two."""
    later = list_checkpoints(checkpoint.parent)
    for damaged in later[: later.index(checkpoint)]:
        remove_checkpoint(damaged)
    keep_newest(checkpoint.parent)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the checkpoint, in words; None if every file is as it was written, and there is no other."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    there = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    for name, (size, digest) in expected.items():
        if name not in there:
            return f"{name} is missing"
        path = checkpoint / name
        if not path.is_file() or path.is_symlink():
            return f"{name} is no plain file"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if sha256_of(path) != digest:
            return f"{name} is not what was written"
    foreign = sorted(there - expected.keys())
    return f"{foreign[0]} does not belong to it" if foreign else None


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None where there is none. Prints a line for each damaged one."""
    for checkpoint in list_checkpoints(folder):
        if not (wrong := find_damage(checkpoint)):
            return checkpoint
        print(f"{checkpoint} is damaged ({wrong}): skipped")
    return None


def read_run_identity(checkpoint: Path) -> dict[str, Any]:
    """What `seal` was told of the run."""
    run: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["run"]
    return run
