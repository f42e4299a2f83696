"""What a run with preferences warns of: a learning rate that is too large for them, and answers that are unlearnt."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerState

from common.model.config import load_config
from common.recipe import PREFERENCE_DEFAULTS, PreferenceSpec, Recipe
from common.run.preference_metrics import NLLS

# The first movement of an adapter grows with alpha times the learning rate, whatever the rank (docs/defaults.md).
USUAL_RATE, LARGE_RATE, AT_ALPHA = 1e-5, 1e-4, 32
# Below it, models take larger rates: that of 8B is about 1e-5, and the best rate falls with the hidden size.
REAL_HIDDEN_SIZE = 1024

# Both answers of a pair become less likely in most runs: the loss asks for their difference alone. Half a nat a token
# is more than that: each token of a chosen answer is 0.6 times (e^-0.5) as likely as it was, so one of 100 tokens
# e^-50 times. It is five times the rise off the task that common.run.drift calls large.
COLLAPSE_RISE = 0.5
WINDOW = 10  # optimizer steps that are averaged: those of one step are other answers than those of the next


def warn_of_learning_rate(recipe: Recipe) -> str | None:
    """A line where the learning rate is instruction tuning's rather than one for preferences; None where it is not."""
    lora, rate = recipe.lora, recipe.train.learning_rate
    strength = lora.alpha * (lora.rank**0.5 if lora.rslora else 1.0) / AT_ALPHA  # what one unit of rate moves
    if rate * strength <= LARGE_RATE * (1 + 1e-9) or load_config(recipe.model).hidden_size < REAL_HIDDEN_SIZE:
        return None
    return (
        f"warning: a learning rate of {rate:g} moves this adapter as {rate * strength:.2g} does at alpha {AT_ALPHA}, "
        f"which is for instruction tuning. With preferences the usual one is {USUAL_RATE / strength:.2g} here; far "
        f'above it a model unlearns both answers: SET="train.learning_rate={USUAL_RATE / strength:.2g}"'
    )


def rise_of_chosen(nll: Sequence[float]) -> float | None:
    """By how much the chosen answers' NLL a token has risen over that of the first steps, where it is a sign of
    collapse: by more than COLLAPSE_RISE, and still rising. None where it is not.

    nll: of the steps so far, in nats.
    """
    if len(nll) < 2 * WINDOW:
        return None
    first, before, now = (sum(part) / WINDOW for part in (nll[:WINDOW], nll[-2 * WINDOW : -WINDOW], nll[-WINDOW:]))
    return now - first if now > max(before, first + COLLAPSE_RISE) else None


def first_sign_of_collapse(entries: Sequence[dict[str, Any]]) -> tuple[int, float] | None:
    """The first step at which rise_of_chosen says so, and what it says; None where no step does.

    entries: of metrics.jsonl, or of the trainer's log.
    """
    steps = [(entry["step"], entry[NLLS[1]]) for entry in entries if NLLS[1] in entry]
    values = [value for _, value in steps]
    for count in range(2 * WINDOW, len(steps) + 1):
        # The steps between the first ones and the last ones count for nothing.
        until_then = values[:WINDOW] + values[max(WINDOW, count - 2 * WINDOW) : count]
        if (rise := rise_of_chosen(until_then)) is not None:
            return steps[count - 1][0], rise
    return None


def collapse_line(step: int, rise: float, spec: PreferenceSpec) -> str:
    advice = ["lower TrainSpec.learning_rate"]
    advice += ["raise PreferenceSpec.beta"] if spec.needs_reference else []
    advice += ["raise PreferenceSpec.sft_weight"] if "sft_weight" in PREFERENCE_DEFAULTS[spec.loss] else []
    return (
        f"step {step}: the better answers have become less likely themselves, by {rise:.2f} nats a token since the "
        f"first steps, and it goes on: an early sign of collapse. To keep what the model can do, {', or '.join(advice)}"
    )


class CollapseWatch(TrainerCallback):
    """Says once, in a line, when the chosen answers' likelihood falls without end. A resumed run does not say again."""

    def __init__(self, spec: PreferenceSpec) -> None:
        self.spec = spec
        self.was_said = False
        self.entries_read, self.last_step, self.nll = 0, 0, list[float]()  # of the log: it is read on at each step

    def on_train_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        self.was_said = first_sign_of_collapse(state.log_history) is not None

    def on_log(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if self.was_said:
            return
        for entry in state.log_history[self.entries_read :]:
            if NLLS[1] in entry:
                self.last_step = entry["step"]
                self.nll.append(entry[NLLS[1]])
        self.entries_read = len(state.log_history)
        if (rise := rise_of_chosen(self.nll)) is not None:
            self.was_said = True
            print(f"\nwarning: {collapse_line(self.last_step, rise, self.spec)}", flush=True)
