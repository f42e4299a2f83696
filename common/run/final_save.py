"""Saves what was trained, of which there may be no other copy: it waits for room, or takes another folder."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from common.machine.disk import format_bytes
from common.machine.slow_work import format_duration
from common.machine.write_errors import write_failure
from common.recipe import UserError
from common.run.checkpoints import list_checkpoints
from common.run.folder import CHECKPOINTS

WAIT_SECONDS = 300.0  # for room; the other processes of a run give up on the main one after ten minutes
LOOK_EVERY_SECONDS = 3.0


def save_without_loss(write: Callable[[Path], None], folder: Path, fallback: Path | None, size: int) -> Path:
    """Calls write(folder), which writes what must not be lost. Returns the folder that holds it now.

    After a failed write it tries `fallback`, where there is one, then both again for WAIT_SECONDS. size: bytes that
    `write` needs. Raises UserError when nothing helped; then the checkpoints, where there are any, hold the run.
    """
    reasons = {place: "" for place in (folder, fallback) if place is not None}
    deadline = time.monotonic() + WAIT_SECONDS
    was_said = False
    while True:
        for place in reasons:
            try:
                write(place)
            except Exception as error:
                if (reason := write_failure(error)) is None:
                    raise
                reasons[place] = f"{place} cannot be written: {reason}{_room_in_words(place, size)}"
            else:
                if place != folder:
                    print(f"warning: {reasons[folder]}. What was trained is in {place} instead")
                return place
        if time.monotonic() >= deadline:
            raise UserError(f"{'; '.join(reasons.values())}. {_remains(folder)}")
        if not was_said:
            print(
                f"warning: {'; '.join(reasons.values())}. What was trained is in memory only: make room within "
                f"{format_duration(WAIT_SECONDS)} minutes, it is tried again every few seconds",
                flush=True,
            )
        was_said = True
        time.sleep(min(LOOK_EVERY_SECONDS, max(0.0, deadline - time.monotonic())))


def _room_in_words(place: Path, size: int) -> str:
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return ""
    return f" ({format_bytes(size)} are needed, {format_bytes(free)} are free)"


def _remains(folder: Path) -> str:
    checkpoints = list_checkpoints(folder / CHECKPOINTS)
    if not checkpoints:
        return "What was trained is lost: there is no checkpoint. Make room, then begin anew: ARGS=--overwrite"
    return f"Make room, then go on from {checkpoints[0].name}: ARGS=--resume"


def write_optional(name: str, write: Callable[[], object]) -> list[str]:
    """Calls `write`, for a file that a run can do without. Returns [name], or none after a warning with the reason."""
    try:
        write()
    except Exception as error:
        reason = write_failure(error) or f"{type(error).__name__}: {str(error) or 'no reason is given'}"
        print(f"warning: {name} could not be made ({' '.join(reason.split())}); the rest is saved")
        return []
    return [name]
