"""Checkpoints on disk, each whole or not there: written aside, synced, hashed and renamed, and verified before use.

A killed process leaves its last whole checkpoint, and folders whose names begin with a dot, which the next run removes.
The manifest finds accidents. It does not find an attacker, who could write the manifest anew.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.machine.collectives import all_reduce_max, run_on_main
from common.machine.disk import WRITING_SUFFIX, remove_atomically, remove_leftovers, replace_atomically, sha256_of
from common.machine.processes import is_main_process
from common.machine.slow_work import report_slow_work
from common.machine.write_errors import write_failure
from common.run.folder import CHECKPOINT_PREFIX
from common.run.replaced_run import remove_replaced

MANIFEST = "manifest.json"
CHECKPOINTS_KEPT = 2  # newest ones


def staging_folder(folder: Path) -> Path:
    """Where a checkpoint of this folder is written before it is whole; remove_leftovers knows the name."""
    return folder / WRITING_SUFFIX


def checkpoint_of_step(folder: Path, step: int) -> Path:
    return folder / f"{CHECKPOINT_PREFIX}{step}"


def write_checkpoint(
    folder: Path, step: int, write: Callable[[], object], run: dict[str, Any], best: int | None = None
) -> None:
    """Makes checkpoint-<step> in the folder, and removes all but the newest checkpoints and that of the step `best`.

    A run that this one replaces is removed when the first one is there.

    write: writes the files into staging_folder(folder) / checkpoint-<step>; every process calls it. run: what the
    checkpoint belongs to. When a process cannot write, for a full disk, a warning says so and the run can go on: the
    checkpoint before is still there.
    """
    name, failure = checkpoint_of_step(folder, step).name, ""
    run_on_main(lambda: remove_leftovers(folder))
    with report_slow_work(f"writing {name}"):
        try:
            write()
        except Exception as error:
            failure = _reason_of(error)
        if not all_reduce_max(bool(failure)) and is_main_process():
            try:
                commit_checkpoint(staging_folder(folder) / name, folder / name, run)
                remove_replaced(folder.parent)
                keep_newest(folder, best)
            except Exception as error:
                failure = _reason_of(error)
    if all_reduce_max(bool(failure)):
        kept = next((path.name for path in list_checkpoints(folder)), "none yet")
        reason = failure or "another process says why"
        print(f"warning: {name} cannot be written ({reason}); training goes on, the last checkpoint is {kept}")
    run_on_main(lambda: remove_leftovers(folder))


def _reason_of(error: Exception) -> str:
    """Why the checkpoint could not be written. Raises the error again when it is no failed write."""
    if (reason := write_failure(error)) is None:
        raise error
    return reason


def commit_checkpoint(written: Path, target: Path, run: dict[str, Any]) -> None:
    """Renames the folder `written` to `target`, with a manifest that holds `run` and every file's size and sha256.

    Everything is synced first: when this returns, the checkpoint is on the disk and not only in the system's memory.
    A crash leaves the old `target`, none, or the whole new one.
    """
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(written.iterdir())}
    manifest = written / MANIFEST
    manifest.write_text(json.dumps({"run": run, "files": files}, indent=1) + "\n", encoding="utf-8")
    replace_atomically(written, target, durable=True)


def step_of_checkpoint(checkpoint: Path) -> int:
    """Raises ValueError for a folder of another name."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, newest first."""
    found = [
        path for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit()
    ]
    return sorted(found, key=step_of_checkpoint, reverse=True)


def keep_newest(folder: Path, best: int | None = None) -> None:
    """Removes all checkpoints but the CHECKPOINTS_KEPT newest ones and that of the step `best`."""
    for old in list_checkpoints(folder)[CHECKPOINTS_KEPT:]:
        if best is None or old != checkpoint_of_step(folder, best):
            remove_atomically(old)


def go_back_to(checkpoint: Path, best: int | None = None) -> None:
    """Removes the checkpoints that are newer than this one, which are damaged, and then as keep_newest."""
    checkpoints = list_checkpoints(checkpoint.parent)
    for damaged in checkpoints[: checkpoints.index(checkpoint)]:
        remove_atomically(damaged)
    keep_newest(checkpoint.parent, best)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the checkpoint, in words; None when each file is as it was written and no other is there."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    present = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    for name, (size, digest) in expected.items():
        if name not in present:
            return f"{name} is missing"
        path = checkpoint / name
        if not path.is_file() or path.is_symlink():
            return f"{name} is no plain file"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if sha256_of(path) != digest:
            return f"{name} is not what was written"
    foreign = sorted(present - expected.keys())
    return f"{foreign[0]} does not belong to it" if foreign else None


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint without damage; None where there is none. Prints a line for each damaged one."""
    for checkpoint in list_checkpoints(folder):
        if not (damage := find_damage(checkpoint)):
            return checkpoint
        print(f"{checkpoint} is damaged ({damage}): skipped")
    return None


def read_run_identity(checkpoint: Path) -> dict[str, Any]:
    """The `run` that commit_checkpoint got."""
    run: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["run"]
    return run
