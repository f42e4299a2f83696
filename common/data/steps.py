"""How many optimizer steps packed rows are."""

import math

from common.recipe import TrainSpec


def steps_per_epoch(rows: int, train: TrainSpec) -> int:
    """The last step of an epoch may have fewer rows than the others."""
    return math.ceil(rows / train.rows_per_step)


def count_steps(rows: int, train: TrainSpec) -> int:
    """Optimizer steps of the whole run."""
    return train.max_steps or math.ceil(train.epochs * steps_per_epoch(rows, train))


def few_rows_warning(rows: int, train: TrainSpec) -> str | None:
    """A line that says so where an epoch is a single step; None where it is not."""
    if rows > train.rows_per_step:
        return None
    there = "there is 1 packed row" if rows == 1 else f"there are {rows} packed rows"
    return (
        f"warning: {there} and rows_per_step is {train.rows_per_step}: an epoch is a single step. Lower rows_per_step, "
        "or raise epochs"
    )
