"""What a user reads while gigabytes load: a line before it begins, and one every ten seconds. Small models are silent.

On several processes only the main one is heard: the standard output of the others is closed (init_distributed).
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.machine.disk import format_bytes
from common.recipe import ModelSpec

MIN_ANNOUNCED_BYTES = 1 << 30  # a smaller model loads, and a smaller file is verified, within a few seconds


def announce_loading(spec: ModelSpec, files: int, size: int, *, quantizes: bool) -> None:
    """Prints what is loaded, when that takes a while. files: 0 for random weights. size: bytes before quantization."""
    if size < MIN_ANNOUNCED_BYTES:
        return
    origin = {0: "random weights", 1: "1 file"}.get(files, f"{files} files")
    then = f", quantized to NF4 as they are {'read' if files else 'drawn'}" if quantizes else ""
    print(f"loading {spec.name}: {origin}, {format_bytes(size)}{then}", flush=True)


@contextmanager
def report_progress(describe: Callable[[float], str], every_s: float = 10.0) -> Iterator[None]:
    """Prints describe(seconds since it began) every `every_s` seconds while the block runs.

    It prints from a thread of its own, because the block may be one long call into a library.
    """
    began, done = time.monotonic(), threading.Event()

    def print_lines() -> None:
        while not done.wait(every_s):
            print(describe(time.monotonic() - began), flush=True)

    thread = threading.Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
