"""Ctrl-C, SIGTERM and a closed terminal stop a run after the optimizer step under way, with a checkpoint.

Who insists, with a second Ctrl-C or SIGTERM, stops it at once. What comes in the same moment is one signal: where all
processes of a job get it (timeout, systemd, Slurm), make and the launcher hand theirs on as well. SIGHUP is never taken
for insisting: a terminal that is closed sends it twice (the kernel and the shell), and a session that ends sends it
along with SIGTERM.
"""

import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from common.machine.collectives import all_reduce_max
from common.machine.launch import ONE_SIGNAL_SECONDS
from common.recipe import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AFTER_THIS_STEP = "stopping after this step, with a checkpoint"


class StopSignals(TrainerCallback):
    """Inside its `with` block a signal waits for the end of the step, where a checkpoint can hold the exact state,
    random numbers included. received: the signal that came; None without one.

    SIGHUP stays ignored where it is (nohup). promise: printed when the first signal comes.
    """

    def __init__(self, promise: str = AFTER_THIS_STEP) -> None:
        self.promise = promise
        self.received: signal.Signals | None = None
        self.insists_from = float("inf")  # the time from which another signal insists
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGHUP:
            if time.monotonic() > self.insists_from:
                raise KeyboardInterrupt
            self.insists_from = min(self.insists_from, time.monotonic() + ONE_SIGNAL_SECONDS)
        if self.received is None:
            with suppress(RuntimeError):  # the signal came in the middle of another print
                print(f"\n{self.promise}; once more stops at once", flush=True)
        if self.received is None or number != signal.SIGHUP:
            self.received = signal.Signals(number)

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        """Stops all processes after the same step, whichever of them got the signal."""
        self.agree()
        if self.received is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def agree(self) -> None:
        """Makes `received` the same in all processes."""
        if number := all_reduce_max(self.received or 0):  # else a signal may have come meanwhile
            self.received = signal.Signals(number)

    def raise_if_received(self, message: str) -> None:
        """Raises Stopped, in all processes, when one of them got a signal after the last step."""
        self.agree()
        if self.received is not None:
            raise Stopped(message, self.received, can_go_on=False)
