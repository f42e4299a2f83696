"""The learning rate of each optimizer step: a linear warmup, then the recipe's schedule.

transformers' schedules begin the warmup at 0, so that the first step changes nothing, and round a share of less than a
step up to one. A run of a single step would learn nothing.
"""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.recipe import Schedule


def warmup_steps(warmup_ratio: float, steps: int) -> int:
    """Whole steps in a share of all steps, rounded down."""
    return int(warmup_ratio * steps + 1e-9)  # 0.29 * 100 is 28.999999999999996


def lr_factor(step: int, *, schedule: Schedule, warmup: int, steps: int) -> float:
    """Share of the peak learning rate at a step, counted from 0: above 0 for every step of the run, at most 1.

    The warmup rises by equal parts to the peak, which the step after it has: (step + 1) / (warmup + 1).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    match schedule:
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case "linear":
            return 1 - done
        case "constant":
            return 1.0


def build_lr_schedule(optimizer: Optimizer, schedule: Schedule, warmup_ratio: float, steps: int) -> LambdaLR:
    """Sets the optimizer's learning rate to that of the first step; each call of its step() to that of the next.

    steps: of the whole run.
    """
    factor = partial(lr_factor, schedule=schedule, warmup=warmup_steps(warmup_ratio, steps), steps=steps)
    return LambdaLR(optimizer, factor)


def set_lr_of_next_step(schedule: LambdaLR) -> None:
    """Sets the optimizer's learning rate by this schedule, after both were loaded from a checkpoint.

    A loaded optimizer has the learning rate of the schedule that the checkpoint was written under: 0 where that was to
    end there, and this one goes on.
    """
    shares = (factor(schedule.last_epoch) for factor in schedule.lr_lambdas)
    for group, peak, share in zip(schedule.optimizer.param_groups, schedule.base_lrs, shares, strict=True):
        group["lr"] = peak * share
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]  # what get_last_lr returns
