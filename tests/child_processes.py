"""Children of a test: none is waited for without an end, or a fault would hang the tests instead of failing one."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

SECONDS = 300.0  # far more than any of these takes


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.005)


def ended(child: int, seconds: float = SECONDS) -> int:
    """Its exit status; minus the signal's number when a signal ended it. One that does not end is killed."""
    status = 0

    def has_ended() -> bool:
        nonlocal status
        found, status = os.waitpid(child, os.WNOHANG)
        return found == child

    try:
        wait_until(has_ended, "a child's end", seconds)
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        raise
    return os.waitstatus_to_exitcode(status)
