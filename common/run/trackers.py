"""Hands the metrics of a run to a tracker, which may fail without ending the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from common.process_state import set_tracker_variable
from common.recipe import ReportTo
from common.run.folder import MLFLOW, SWANLAB, TENSORBOARD, TRACKIO

# By what variable of the environment a tracker learns where to write. wandb makes a folder of that name in there.
FOLDERS = {
    "mlflow": ("MLFLOW_TRACKING_URI", MLFLOW),
    "swanlab": ("SWANLAB_LOG_DIR", SWANLAB),
    "tensorboard": ("TENSORBOARD_LOGGING_DIR", TENSORBOARD),
    "trackio": ("TRACKIO_DIR", TRACKIO),
    "wandb": ("WANDB_DIR", ""),
}


def keep_tracker_files(tracker: ReportTo, folder: Path) -> None:
    """Lets the tracker write into the run's folder, unless the user's environment names another place.

    clearml learns the run's name by a variable too; the others take it from the trainer.
    """
    if tracker in FOLDERS:
        variable, name = FOLDERS[tracker]
        place = (folder / name).absolute()
        if tracker == "mlflow":
            place.mkdir(parents=True, exist_ok=True)  # SQLite makes the file, and no folder
        set_tracker_variable(variable, f"sqlite:///{place}/mlflow.db" if tracker == "mlflow" else str(place))
    if tracker == "clearml":
        set_tracker_variable("CLEARML_TASK", folder.absolute().name)


class GuardedTracker(TrainerCallback):
    """A tracker's callback of transformers, made when it is first called. Its first error is printed and ends it.

    It hears what a trainer tells its callbacks from the first metrics on; `on_init_end`, which came before, first.
    """

    def __init__(self, tracker: ReportTo) -> None:
        self.tracker = tracker
        self.callback: TrainerCallback | None = None
        self.has_failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        self._call(args, state, control, lambda tracker: tracker.on_train_begin(args, state, control, **named))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        self._call(args, state, control, lambda tracker: tracker.on_step_end(args, state, control, **named))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        self._call(args, state, control, lambda tracker: tracker.on_log(args, state, control, **named))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        self._call(args, state, control, lambda tracker: tracker.on_save(args, state, control, **named))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        self._call(args, state, control, lambda tracker: tracker.on_train_end(args, state, control, **named))

    def _call(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        event: Callable[[TrainerCallback], object],
    ) -> None:
        if self.has_failed:
            return
        try:
            if self.callback is None:
                (made,) = get_reporting_integration_callbacks([self.tracker])
                self.callback = made(name=args.run_name) if self.tracker == "neptune" else made()
                self.callback.on_init_end(args, state, control)
            event(self.callback)
        except Exception as error:  # a tracker's code, network and disk: any error of theirs is less than a run
            self.has_failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"\nwarning: {self.tracker} failed ({reason}); training goes on without it, metrics.jsonl has all")
