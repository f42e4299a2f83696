"""What torch's CPU allocator gives out while a test looks, as its profiler sees it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile


@contextmanager
def watched_allocations() -> Iterator[profile]:
    """A profiler of allocations. What earlier code left to the garbage collector is freed before, and none within.

    A block of an earlier profile that is freed in this one counts below zero: the profiler still knows its size.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield profiler
    finally:
        if enabled:
            gc.enable()


def peak_in(profiler: profile) -> int:
    """Bytes that the allocator has given out since the profiler began, at the worst moment."""
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
