"""Says that long work goes on: no silence longer than ten seconds, and no line for what is quick."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.machine.processes import is_main_process
from common.output_stream import is_cell

FIRST_LINE_SECONDS = 3.0  # work that ends before is not mentioned
LINE_SECONDS = 10.0  # from one line to the next
CELL_SECONDS = 1.0  # from one status to the next in its place, below a notebook's cell, whose file may keep them all
CELL_WIDTH = 120  # characters: as long as a status is, with spaces over what is left of the one before it


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def show_status(text: str, *, keep: bool = False) -> None:
    """Prints a line; on a terminal and in a notebook in the place of the status before it. keep: the next one goes
    below it.

    An empty text clears the place there, and prints nothing elsewhere.
    """
    if sys.stdout.isatty():
        sys.stdout.write(f"\r\033[K{text}" + ("\n" if keep else ""))
    elif is_cell(sys.stdout):
        sys.stdout.write(f"\r{text:<{CELL_WIDTH}}" + ("\n" if keep else "" if text else "\r"))
    elif text:
        sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def seconds_between_statuses(otherwise: float = LINE_SECONDS) -> float:
    """How often show_status may be called: on a terminal at any time. otherwise: where each is a line of its own."""
    if sys.stdout.isatty():
        return 0.0
    return CELL_SECONDS if is_cell(sys.stdout) else otherwise


@contextmanager
def called_in_thread(do: Callable[[], None], first_seconds: float, every_seconds: float) -> Iterator[None]:
    """Calls `do` in a thread of its own while the block runs: after first_seconds, then every every_seconds.

    Only in the main process, which alone prints. The thread has ended when the block is left.
    """
    if not is_main_process():
        yield
        return
    ended = threading.Event()

    def repeat() -> None:
        wait = first_seconds
        while not ended.wait(wait):
            do()
            wait = every_seconds

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass
class WorkDone:
    """How far the work is that a status line tells of."""

    done: int = 0  # of its units; whoever does the work counts
    note: str = ""  # for work that no single number tells of


@contextmanager
def report_slow_work(
    what: str,
    total: int | None = None,
    unit: str = "",
    first_seconds: float | None = None,
    every_seconds: float | None = None,
) -> Iterator[WorkDone]:
    """Prints what the block does once that takes longer than first_seconds, then every every_seconds: "held-out loss:
    40 of 200 rows, 0:13", or "loading, 0:13" without a total, or with a note in the count's place.

    None: FIRST_LINE_SECONDS and LINE_SECONDS.
    """
    work, started_at, was_shown = WorkDone(), time.perf_counter(), False

    def show() -> None:
        nonlocal was_shown
        count = "" if total is None else f": {work.done:,} of {total:,} {unit}".rstrip()
        count += f": {work.note}" if work.note else ""
        show_status(f"{what}{count}, {format_duration(time.perf_counter() - started_at)}")
        was_shown = True

    try:
        first = FIRST_LINE_SECONDS if first_seconds is None else first_seconds
        with called_in_thread(show, first, LINE_SECONDS if every_seconds is None else every_seconds):
            yield work
    finally:
        if was_shown:
            show_status("")
