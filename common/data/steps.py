"""How many optimizer steps packed rows are, how many are enough, and the rows of a step that give as many."""

import math
from dataclasses import replace

from common.recipe import AUTO_ROWS_PER_STEP, TrainSpec, UserError

# "At least 100 steps, better 1,000": tinker-cookbook's advice on LoRA hyperparameters. Small batches learn as much per
# token as large ones, and more steadily (arXiv:2507.07101).
ENOUGH_STEPS = 100
MAX_ADVISED_EPOCHS = 10  # beyond it other data helps more


def steps_per_epoch(rows: int, train: TrainSpec) -> int:
    """The last step of an epoch may have fewer rows than the others."""
    return math.ceil(rows / train.most_rows_per_step)


def count_steps(rows: int, train: TrainSpec) -> int:
    """Optimizer steps of the whole run."""
    return train.max_steps or math.ceil(train.epochs * steps_per_epoch(rows, train))


def settle_rows_per_step(train: TrainSpec, rows: int, processes: int = 1) -> TrainSpec:
    """For rows_per_step="auto" the spec with a number: the largest that gives ENOUGH_STEPS within the epochs.

    The smallest where none does. Only numbers that the processes can share evenly are taken, and max_steps has no
    influence. The learning rate, which is that of the largest number, is scaled by the square root of the share: noise
    of a gradient falls with the root of the rows behind it, and Adam divides by it (arXiv:2205.10287). A spec with a
    number is returned as it is. rows: packed rows that are trained. Raises UserError where no number can be shared.
    """
    if train.rows_per_step != "auto":
        return train
    choices = [count for count in AUTO_ROWS_PER_STEP if count % processes == 0]
    if not choices:
        raise UserError(
            f'TrainSpec.rows_per_step is "auto", which takes at most {AUTO_ROWS_PER_STEP[0]} rows, and {processes} '
            f"processes cannot share them evenly: set a multiple of {processes}"
        )
    chosen = next((n for n in choices if _steps(rows, train, n) >= ENOUGH_STEPS), choices[-1])
    rate = train.learning_rate * math.sqrt(chosen / AUTO_ROWS_PER_STEP[0])
    return replace(train, rows_per_step=chosen, learning_rate=rate)


def step_lines(rows: int, train: TrainSpec, processes: int = 1) -> list[str]:
    """How many optimizer steps an epoch and the run have, in words, what "auto" chose, and a warning of few."""
    settled = settle_rows_per_step(train, rows, processes)
    packed = "1 packed row" if rows == 1 else f"{rows:,} packed rows"
    lines = [
        f"optimizer steps: {steps_per_epoch(rows, settled):,} an epoch ({packed}, {settled.rows_per_step} a step); "
        f"the run takes {count_steps(rows, settled):,}"
    ]
    if settled is not train:
        lines.append(
            f'    chosen by rows_per_step="auto"; learning_rate {train.learning_rate:g} × '
            f"√({settled.rows_per_step}/{AUTO_ROWS_PER_STEP[0]}) = {settled.learning_rate:.3g}"
        )
    if warning := few_steps_warning(rows, settled):
        lines.append(warning)
    return lines


def few_steps_warning(rows: int, train: TrainSpec) -> str | None:
    """A line that says what gives more steps where the data gives fewer than ENOUGH_STEPS; None where it does not.

    None also where the recipe sets max_steps: that many are wanted.
    """
    steps = count_steps(rows, train)
    if train.max_steps is not None or steps >= ENOUGH_STEPS:
        return None
    now = train.most_rows_per_step
    smaller = [count for count in AUTO_ROWS_PER_STEP if count < now]
    ways = []
    if smaller:
        fewer = next((n for n in smaller if _steps(rows, train, n) >= ENOUGH_STEPS), smaller[-1])
        ways.append(f"rows_per_step={fewer}: {_in_words(_steps(rows, train, fewer))}")
    for count, name in ((now, ""), (smaller[-1] if smaller else now, "rows_per_step=1 and ")):
        epochs = math.ceil(ENOUGH_STEPS / math.ceil(rows / count))
        if train.epochs < epochs <= MAX_ADVISED_EPOCHS:
            ways.append(f"{name}epochs={epochs}: {_in_words(epochs * math.ceil(rows / count))}")
            break
    if not ways:
        return f"warning: the run takes {_in_words(steps)}, and below {ENOUGH_STEPS} a model learns little: add data"
    scaled = '; rows_per_step="auto" chooses, and scales the learning rate' if smaller else ""
    return (
        f"warning: the run takes {_in_words(steps)}, and below {ENOUGH_STEPS} a model learns little. More of them: "
        f"{'; '.join(ways)}{scaled}"
    )


def _steps(rows: int, train: TrainSpec, rows_per_step: int) -> int:
    return count_steps(rows, replace(train, rows_per_step=rows_per_step, max_steps=None))


def _in_words(steps: int) -> str:
    return "1 optimizer step" if steps == 1 else f"{steps:,} optimizer steps"
