"""A line that says how far a long loop is."""

import time


class ProgressLine:
    """Counts the steps of a loop, and prints `label done of total` when `every` seconds have passed without a line."""

    def __init__(self, label: str, total: int, every: float = 10.0) -> None:
        self.label, self.total, self.every = label, total, every
        self.done = 0
        self.shown_at = time.monotonic()

    def advance(self) -> None:
        self.done += 1
        if time.monotonic() - self.shown_at >= self.every:
            print(f"  {self.label} {self.done} of {self.total}", flush=True)
            self.shown_at = time.monotonic()
