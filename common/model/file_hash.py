"""sha256 of large files, each read once: what was computed is remembered as long as the file does not change."""

import contextlib
import os
import re
import time
from pathlib import Path

from common.machine.disk import format_bytes, sha256_of
from common.machine.slow_work import report_slow_work

NOTES = Path(".cache") / "sha256"  # a small file for each file that was hashed, named after its identity
CLOCK_TICK_SECONDS = 0.05  # a file system's clock is coarser than its time stamps


def remembered_sha256(path: Path) -> str:
    """sha256 of a file; reads it at a GiB a second or so, unless its size and time stamps are those of an earlier call.

    The time of the last change of the inode (ctime) is among them, which no program can set back.
    """
    before = path.stat()
    # A write within the same tick of the clock would leave the time stamps as they are.
    time.sleep(min(CLOCK_TICK_SECONDS, max(0.0, CLOCK_TICK_SECONDS - (time.time() - before.st_ctime))))
    note = NOTES / _identity(before)
    with contextlib.suppress(OSError):
        remembered = note.read_text(encoding="utf-8")
        if len(remembered) == 64:
            return remembered
    with report_slow_work(f"hashing {path.name} ({format_bytes(before.st_size)}), once"):
        sha256 = sha256_of(path)
    if _identity(path.stat()) == note.name:
        with contextlib.suppress(OSError):  # without the note the file is hashed again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(sha256, encoding="utf-8")
    return sha256


def hub_sha256(path: Path) -> str | None:
    """The sha256 that the hub gave a large file as its name in the cache; None for other files."""
    name = path.resolve().name
    return name if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name) else None


def _identity(status: os.stat_result) -> str:
    return "-".join(
        str(part) for part in (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    )
