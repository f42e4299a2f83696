"""What the processes of a run tell each other: collective operations, which every process calls in the same order.

Without init_distributed each of them returns at once.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import DeviceMesh
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from common.machine.processes import is_main_process, local_rank, local_world_size, rank, world_size
from common.process_state import silence_stdout
from common.recipe import UserError

T = TypeVar("T")
# While one process reads a model the others wait, for minutes perhaps. A process that has died is no reason for a limit
# either: the launcher ends those that wait for it.
NO_LIMIT = timedelta(days=7)


def init_distributed() -> None:
    """Connects the processes of the run, and silences standard output in all but the main one (silence_stdout).

    Does nothing in a run of one process, unless torchrun started it: accelerate would connect that with NCCL alone,
    which cannot send what is on the CPU. Raises UserError when the main process cannot be reached.
    """
    if (world_size() == 1 and "LOCAL_RANK" not in os.environ) or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    if not is_main_process():
        silence_stdout()
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"the first process cannot be reached at {where}: {str(error).splitlines()[0]}") from error


def shut_down_distributed() -> None:
    """Ends what init_distributed began. Every process must call it. NCCL warns at the exit of one that did not."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def barrier() -> None:
    """Waits until every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def run_on_main(do: Callable[[], T]) -> T | None:
    """Calls `do` in the main process and returns its result there. The others wait, and return None."""
    result = do() if is_main_process() else None
    barrier()
    return result


def broadcast_from_main(value: T) -> T:
    """Returns the main process's value in every process. The value must be picklable."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def broadcast_on_machine(value: T) -> T:
    """Returns the value of the first process of each machine in all processes of that machine.

    They wait for it as long as it takes. The value must be picklable.
    """
    if not distributed.is_initialized():
        return value
    values = [value]
    first = rank() - local_rank()
    distributed.broadcast_object_list(values, first, _patient_group(), device=torch.device("cpu"))
    return values[0]


def barrier_on_machine() -> None:
    """Waits until every process of this machine has come here."""
    if distributed.is_initialized():
        distributed.barrier(_patient_group())


def all_on_machine(value: bool) -> bool:
    """Returns whether it is true in every process of this machine."""
    if not distributed.is_initialized():
        return value
    least = torch.tensor(int(value))
    distributed.all_reduce(least, distributed.ReduceOp.MIN, _patient_group())
    return bool(least)


@cache
def _patient_group() -> Any:
    return group_of_this_machine(backend="gloo", timeout=NO_LIMIT)


def group_of_this_machine(**options: Any) -> Any:
    """A group of this machine's processes. Every process makes the groups of all machines, as torch wants it."""
    firsts = range(0, world_size(), local_world_size())  # each machine has as many processes
    groups = [distributed.new_group(list(range(first, first + local_world_size())), **options) for first in firsts]
    return groups[rank() // local_world_size()]


def all_gather(value: T) -> list[T]:
    """Returns every process's value, in the order of ranks. The values must be picklable."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Returns the sum of each value over all processes, added up in float64."""
    if not distributed.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)  # on the CPU, with gloo, whatever device computes
    distributed.all_reduce(total)
    return [float(value) for value in total]


def all_reduce_max(value: int) -> int:
    """Returns the largest of all processes' values."""
    if not distributed.is_initialized():
        return value
    largest = torch.tensor(int(value))
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def world_mesh(device_type: str) -> DeviceMesh:
    """Returns a mesh of one dimension over all processes."""
    return init_device_mesh(device_type, (world_size(),))


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a sharded tensor (DTensor). Any other tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All-gathers a sharded tensor (DTensor). Any other tensor is returned as it is.

    Every process must call this for the same tensors, in the same order.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
