"""How a command ends: its exit status, and one line on stderr for what the user can mend."""

import os
import sys
import time
from collections.abc import Callable

from common.machine.failures import failure_in_words
from common.machine.launch import ERROR_STATUS, PEER_LOST_STATUS
from common.machine.processes import is_main_process, rank
from common.recipe import UserError

MAIN_SPEAKS_SECONDS = 10  # head start of the first process, which mostly has the same error to print


def exit_status(action: Callable[[], int | None], folder: str) -> int:
    """Runs `action` and returns the exit status: the one that `action` returns, 0 for None.

    A UserError, a file that cannot be written, and memory that does not suffice become one line on stderr and status
    2; Ctrl-C becomes status 130. Any other exception passes. folder: where the action writes, named when the error
    names no file.
    """
    try:
        return action() or 0
    except UserError as error:
        return _end_with(str(error))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except Exception as error:
        if message := failure_in_words(error, folder):
            return _end_with(message)
        if "WORLD_SIZE" in os.environ and isinstance(error, RuntimeError) and _lost_another_process(error):
            return PEER_LOST_STATUS
        raise


def _end_with(message: str) -> int:
    if not is_main_process():  # the launcher ends this process as soon as the first one has printed and ended
        time.sleep(MAIN_SPEAKS_SECONDS)
    process = "" if is_main_process() else f"process {rank()}: "
    print(f"\n{process}error: {message}", file=sys.stderr)
    return ERROR_STATUS


def _lost_another_process(error: RuntimeError) -> bool:
    """Whether the error is that of a collective whose other process has ended."""
    names = ("DistBackendError", "DistNetworkError", "DistStoreError")
    return type(error).__name__ in names or "gloo/transport" in str(error)
