"""Ctrl-C and SIGTERM stop a run after the optimizer step under way, with a checkpoint; a second one at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from common.machine.collectives import all_reduce_max

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals(TrainerCallback):
    """Inside its `with` block a signal waits for the end of the step, where a checkpoint can hold the exact state,
    random numbers included. received: the signal that came; None without one."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        print("\nstopping after this step, with a checkpoint; once more stops at once", flush=True)

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        """Stops all processes after the same step, whichever of them got the signal."""
        number = all_reduce_max(self.received or 0)
        self.received = signal.Signals(number) if number else None
        if self.received is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
