"""How many optimizer steps packed rows are, how many are enough, and the rows of a step that give as many."""

import math
from dataclasses import replace

from common.recipe import AUTO_ROWS_PER_STEP, TrainSpec, rows_per_process

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


def settle_rows_per_step(train: TrainSpec, rows: int, processes: int = 1, begun_with: int | None = None) -> TrainSpec:
    """For rows_per_step="auto" the spec with a number: the largest that gives ENOUGH_STEPS within the epochs.

    The smallest where none does. Only numbers that the processes can share evenly are taken, and max_steps has no
    influence. The learning rate, which is that of the largest number, is scaled by the square root of the share: noise
    of a gradient falls with the root of the rows behind it, and Adam divides by it (arXiv:2205.10287). A spec with a
    number is returned as it is. rows: packed rows that are trained. begun_with: the number of a run that goes on, which
    keeps it even if its epochs have changed. Raises UserError where the processes cannot share the rows.
    """
    if train.rows_per_step != "auto":
        return train
    rows_per_process(train, processes)
    choices = [count for count in AUTO_ROWS_PER_STEP if count % processes == 0]
    chosen = next((n for n in choices if _steps(rows, train, n) >= ENOUGH_STEPS), choices[-1])
    if begun_with in AUTO_ROWS_PER_STEP:
        chosen = begun_with
    rate = _scaled_rate(train, chosen)
    settled = replace(train, rows_per_step=chosen, learning_rate=rate)
    rows_per_process(settled, processes)
    return settled


def step_lines(rows: int, train: TrainSpec, processes: int = 1, begun_with: int | None = None) -> list[str]:
    """How many optimizer steps an epoch and the run have, in words, what "auto" chose, and a warning of few.

    The arguments are those of settle_rows_per_step. A run that goes on is not warned: its steps cannot be others.
    """
    settled = settle_rows_per_step(train, rows, processes, begun_with)
    packed = "1 packed row" if rows == 1 else f"{rows:,} packed rows"
    limit = " (max_steps)" if train.max_steps is not None else ""
    lines = [
        f"optimizer steps: {steps_per_epoch(rows, settled):,} an epoch ({packed}, {settled.rows_per_step} a step); "
        f"the run takes {count_steps(rows, settled):,}{limit}"
    ]
    if settled is not train:
        chosen = "kept from the run's beginning, for" if begun_with else "chosen by"
        lines.append(
            f'    {chosen} rows_per_step="auto"; learning_rate {train.learning_rate:g} × '
            f"√({settled.rows_per_step}/{AUTO_ROWS_PER_STEP[0]}) = {settled.learning_rate:.3g}"
        )
    if begun_with is None and (warning := few_steps_warning(rows, settled, processes)):
        lines.append(warning)
    return lines


def few_steps_warning(rows: int, train: TrainSpec, processes: int = 1) -> str | None:
    """A line that says what gives more steps where the data gives fewer than ENOUGH_STEPS; None where it does not.

    None also where the recipe sets max_steps: that many are wanted. train: settled.
    """
    steps = count_steps(rows, train)
    if train.max_steps is not None or steps >= ENOUGH_STEPS:
        return None
    now = train.most_rows_per_step
    smaller = [n for n in AUTO_ROWS_PER_STEP if n < now and n % processes == 0 and _steps(rows, train, n) > steps]
    ways = []
    if smaller:
        fewer = next((n for n in smaller if _steps(rows, train, n) >= ENOUGH_STEPS), smaller[-1])
        changes = f"rows_per_step={fewer} with learning_rate={_scaled_rate(train, fewer):.3g}"
        ways.append(f"{changes}: {_in_words(_steps(rows, train, fewer))}")
    for count, name in ((now, ""), *((count, f"rows_per_step={count} and ") for count in smaller[-1:])):
        epochs = math.ceil(ENOUGH_STEPS / math.ceil(rows / count))
        if train.epochs < epochs <= MAX_ADVISED_EPOCHS:
            ways.append(f"{name}epochs={epochs}: {_in_words(epochs * math.ceil(rows / count))}")
            break
    if not ways:
        return f"warning: the run takes {_in_words(steps)}, and below {ENOUGH_STEPS} a model learns little: add data"
    most = AUTO_ROWS_PER_STEP[0]
    auto = f'; or rows_per_step="auto", with learning_rate={_scaled_rate(train, most):.3g} as that of {most} rows'
    return (
        f"warning: the run takes {_in_words(steps)}, and below {ENOUGH_STEPS} a model learns little. More of them: "
        f"{'; '.join(ways)}{auto if smaller else ''}"
    )


def _steps(rows: int, train: TrainSpec, rows_per_step: int) -> int:
    return count_steps(rows, replace(train, rows_per_step=rows_per_step, max_steps=None))


def _scaled_rate(train: TrainSpec, rows_per_step: int) -> float:
    return train.learning_rate * math.sqrt(rows_per_step / train.most_rows_per_step)


def _in_words(steps: int) -> str:
    return "1 optimizer step" if steps == 1 else f"{steps:,} optimizer steps"
