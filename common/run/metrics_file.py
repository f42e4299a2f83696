"""metrics.jsonl: a line for each step and evaluation. Without room on the disk the lines wait in memory."""

import json
from pathlib import Path
from typing import Any

from common.machine.disk import write_text_atomically
from common.run.folder import METRICS


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl, oldest first; none when there is no such file yet."""
    return [entry for entry, _ in _whole_lines(folder / METRICS)]


def curve_of(entries: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """The steps, and what metrics.jsonl says of each under this name."""
    return [(entry["step"], entry[key]) for entry in entries if key in entry]


def _whole_lines(path: Path) -> list[tuple[dict[str, Any], int]]:
    """The entries of the file, and the bytes up to the end of each. A killed run may leave half a line at the end."""
    found, size = [], 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        size += len(line)
        found.append((entry, size))
    return found


class MetricsFile:
    """The entries of a run, all in memory, and metrics.jsonl with as many of them as there was room for.

    entries: oldest first. Only the main process calls what writes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        lines = _whole_lines(self.path)
        self.entries = [entry for entry, _ in lines]
        self.written, self.size = len(lines), lines[-1][1] if lines else 0  # entries and bytes that are on the disk
        self.ends = [end for _, end in lines]
        self.was_said = False

    def keep_until(self, step: int) -> None:
        """Forgets the entries of later steps, which a resumed run computes again. The file follows with `write`."""
        kept = next((i for i, entry in enumerate(self.entries) if entry["step"] > step), len(self.entries))
        del self.entries[kept:]
        if kept < self.written:
            self.written, self.size = kept, self.ends[kept - 1] if kept else 0

    def write(self) -> None:
        """Writes what is not in the file yet. Where that fails, a warning says so once, and the lines wait."""
        try:
            self._append(self.entries[self.written :])
        except OSError as error:
            if not self.was_said:
                print(
                    f"warning: {self.path} cannot be written ({error.strerror or error}); training goes on, and the "
                    "lines wait in memory until there is room"
                )
            self.was_said = True
        else:
            self.was_said = False

    def write_whole(self, folder: Path) -> None:
        """Writes all entries into the folder's metrics.jsonl, complete or not at all. Raises OSError."""
        write_text_atomically(folder / METRICS, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def _append(self, entries: list[dict[str, Any]]) -> None:
        """Leaves no half of a line: what a full disk took only in part is cut off again."""
        lines = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.truncate(self.size)  # never needs room
            count = file.write(lines) if lines else 0
            if count < len(lines):  # the system wrote what fitted; the rest raises its reason
                try:
                    while count < len(lines):
                        count += file.write(lines[count:])
                except OSError:
                    file.truncate(self.size)
                    raise
        self.written, self.size = len(self.entries), self.size + len(lines)
