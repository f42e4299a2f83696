"""Hands the metrics of a run to a tracker, which may fail without ending the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from common.process_state import set_tracker_folder
from common.recipe import ReportTo
from common.run.folder import TENSORBOARD, TRACKIO

# By what variable of the environment a tracker learns where to write. wandb makes a folder of that name in there.
FOLDERS = {
    "tensorboard": ("TENSORBOARD_LOGGING_DIR", TENSORBOARD),
    "trackio": ("TRACKIO_DIR", TRACKIO),
    "wandb": ("WANDB_DIR", ""),
}


def keep_tracker_files(tracker: ReportTo, folder: Path) -> None:
    """Lets the tracker write into the run's folder, unless the user's environment names another place."""
    if tracker != "none":
        variable, name = FOLDERS[tracker]
        set_tracker_folder(variable, (folder / name).absolute())


class GuardedTracker(TrainerCallback):
    """A tracker's callback of transformers, made when it is first called. Its first error is printed and ends it."""

    def __init__(self, tracker: ReportTo) -> None:
        self.tracker = tracker
        self.callback: TrainerCallback | None = None
        self.has_failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        self._call(lambda tracker: tracker.on_train_begin(args, state, control, **named))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        self._call(lambda tracker: tracker.on_log(args, state, control, **named))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        self._call(lambda tracker: tracker.on_save(args, state, control, **named))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        self._call(lambda tracker: tracker.on_train_end(args, state, control, **named))

    def _call(self, event: Callable[[TrainerCallback], object]) -> None:
        if self.has_failed:
            return
        try:
            if self.callback is None:
                (made,) = get_reporting_integration_callbacks([self.tracker])
                self.callback = made()
            event(self.callback)
        except Exception as error:  # a tracker's code, network and disk: any error of theirs is less than a run
            self.has_failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"\nwarning: {self.tracker} failed ({reason}); training goes on without it, metrics.jsonl has all")
