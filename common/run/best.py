"""The best point of a run by its held-out loss: it is kept in a checkpoint, and ends a run that no longer improves.

All of it follows from the losses that the trainer has logged, which each checkpoint holds: a resumed run decides as one
that was never interrupted. The loss before the first step does not count: an adapter that does nothing is no result.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from common.data.rows import Rows
from common.recipe import Keep, TrainSpec, UserError
from common.run.checkpoints import checkpoint_of_step, find_damage

Losses = dict[int, float]  # held-out loss in nats by optimizer step; NaN where it was not finite


def held_out_losses(entries: Iterable[dict[str, Any]]) -> Losses:
    """entries: of metrics.jsonl, or of the trainer's log, which have the same keys."""
    found = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    return {step: loss if math.isfinite(loss) else math.nan for step, loss in found if step > 0}


def best_first(losses: Losses) -> list[int]:
    """The steps with a finite loss, the lowest first; of equal ones the earliest."""
    finite = [step for step, loss in losses.items() if not math.isnan(loss)]
    return sorted(finite, key=lambda step: (losses[step], step))


def best_step(losses: Losses) -> int | None:
    return next(iter(best_first(losses)), None)


def is_out_of_patience(losses: Losses, patience: int | None) -> bool:
    """Whether the last `patience` evaluations did not lower the loss; never with None."""
    best = best_step(losses) or 0
    return patience is not None and sum(step > best for step in losses) >= patience


class HeldOutDecisions(TrainerCallback):
    """After an evaluation: a checkpoint where the loss is the lowest so far, and the end where patience is out."""

    def __init__(self, keep: Keep, patience: int | None) -> None:
        self.keep, self.patience = keep, patience

    def on_evaluate(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        losses = held_out_losses(state.log_history)
        if self.keep == "best" and best_step(losses) == state.global_step:
            control.should_save = True
        if is_out_of_patience(losses, self.patience) and state.global_step < state.max_steps:
            print(
                f"stopping after step {state.global_step}: the last {self.patience} evaluations did not lower the "
                f"held-out loss, which was lowest at step {best_step(losses)} (TrainSpec.patience)"
            )
            control.should_save = control.should_training_stop = True  # a resume finds that the run has ended


def refuse_without_held_out(train: TrainSpec, rows: Rows) -> None:
    """Raises UserError where the recipe wants a decision by the held-out loss, and no rows are held out."""
    if rows.evaluation is None and (train.keep == "best" or train.patience is not None):
        raise UserError(
            'TrainSpec.keep="best" and TrainSpec.patience go by the held-out loss, and no rows are held out: give '
            "DataSpec an eval_source or eval_rows (a tenth of the examples at most), or keep the last step"
        )


def checkpoint_to_keep(folder: Path, losses: Losses, last: int) -> Path | None:
    """The intact checkpoint with the lowest held-out loss; None where no step was better than the last.

    folder: of the checkpoints. last: the last step, whose adapter the model has. Prints what is missing or damaged.
    """
    for step in best_first(losses):
        if step == last:
            return None
        checkpoint = checkpoint_of_step(folder, step)
        damage = find_damage(checkpoint) if checkpoint.is_dir() else "it could not be written, or was removed"
        if damage is None:
            return checkpoint
        print(f"warning: step {step} had the held-out loss {losses[step]:.4f}, and {checkpoint} is of no use: {damage}")
    return None


def kept_line(losses: Losses, kept: int) -> str:
    """What keep="best" took, in words."""
    last = max(losses)
    line = f"kept: the adapter of step {kept}, held-out loss {losses[kept]:.4f}"
    return line if kept == last else f"{line} (after the last step, {last}, it is {losses[last]:.4f})"
