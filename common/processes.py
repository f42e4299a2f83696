"""The processes of a run, one a GPU, and what they tell each other. torchrun starts them and says which is which.

The first one ("main") speaks, and writes what is written once; all of them load, train and decide the same.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def rank() -> int:
    """This process's number among those of the run."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def join() -> None:
    """The processes know each other; all but the first are silent on standard output. Nothing for a single one."""
    if world_size() == 1 or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # for as long as the process lives
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def wait_for_all() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def on_main(do: Callable[[], T]) -> T | None:
    """What the first process gets from it; the others wait, and get None."""
    result = do() if is_main() else None
    wait_for_all()
    return result


def summed(values: Sequence[float]) -> list[float]:
    """Each value summed over all processes, in float64."""
    if not distributed.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)  # on the CPU: gloo sums it, whatever computes
    distributed.all_reduce(total)
    return [float(value) for value in total]


def highest(value: int) -> int:
    """The largest of all processes' values: the same in all of them."""
    if not distributed.is_initialized():
        return value
    largest = torch.tensor(int(value))
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)
