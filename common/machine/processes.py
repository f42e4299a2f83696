"""The processes of a run, one a GPU, and what they tell each other. torchrun starts them and says which is which.

The first one ("main") speaks, and writes what is written once; all of them load, train and decide the same.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import DeviceMesh
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from common.recipe import UserError

T = TypeVar("T")
SHARED_MEMORY = "/dev/shm"
SMALLEST_SHARED = 1 << 20  # bytes of a tensor that is worth it


@dataclass(frozen=True)
class Layout:
    """How a model lies over the processes of a run, one a card."""

    processes: int = 1
    sharded: bool = False  # each card has a part of every decoder layer (FSDP2); else the whole model
    on_host: int = 0  # layers whose parts wait in host memory

    def __post_init__(self) -> None:
        if self.on_host and not self.sharded or self.sharded and self.processes == 1:
            raise ValueError(f"no such layout: {self}")

    def __str__(self) -> str:
        if self.processes == 1:
            return "one process"
        if not self.sharded:
            return f"data parallel: each of {self.processes} cards has the whole model"
        layers = "1 layer" if self.on_host == 1 else f"{self.on_host} layers"
        host = f", the parts of {layers} in host memory" if self.on_host else ""
        return f"layers sharded over {self.processes} cards (FSDP2){host}"


ONE_PROCESS = Layout()


def rank() -> int:
    """This process's number among those of the run."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return rank() == 0


def init_distributed() -> None:
    """The processes know each other; all but the first are silent on standard output. Nothing for a single one."""
    if world_size() == 1 or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # for as long as the process lives
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"the first process cannot be reached at {where}: {str(error).splitlines()[0]}") from error


def shut_down_distributed() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def run_on_main(do: Callable[[], T]) -> T | None:
    """What the first process gets from it; the others wait, and get None."""
    result = do() if is_main_process() else None
    barrier()
    return result


def broadcast_from_main(value: T) -> T:
    """The first process's value, in all of them."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_gather(value: T) -> list[T]:
    """Every process's value, in the order of their ranks."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def read_once_per_machine(device: torch.device, read: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """The tensors that `read` gives in the first process of this machine: in all of its processes, on `device`.

    On a CPU they are the same memory, which must not be written to.
    """
    if local_world_size() == 1:
        return [tensor.to(device) for tensor in read(*arguments)]
    first, group = rank() - local_rank(), _group_here()
    tensors = [tensor.to(device).contiguous() for tensor in read(*arguments)] if local_rank() == 0 else []
    told: list[Any] = [[(tensor.shape, tensor.dtype, _place(tensor)) for tensor in tensors]]
    distributed.broadcast_object_list(told, first, group, device=torch.device("cpu"))
    received = []
    for number, (shape, dtype, place) in enumerate(told[0]):
        if place:
            shared = torch.from_file(place, shared=True, size=shape.numel(), dtype=dtype).view(shape)
            if tensors:
                shared.copy_(tensors[number])
                tensors[number] = shared
            distributed.barrier(group)  # it is there, and all have it: the file's name can go
            if tensors:
                os.unlink(place)
        else:
            shared = tensors[number] if tensors else torch.empty(shape, dtype=dtype, device=device)
            distributed.broadcast(shared, first, group)
        received.append(shared)
    return received


def _place(tensor: Tensor) -> str | None:
    """A file in memory that processes on a CPU can share the tensor in; None without room for it, and on a GPU."""
    if tensor.is_cuda or not os.path.isdir(SHARED_MEMORY):
        return None
    room = os.statvfs(SHARED_MEMORY)
    if tensor.nbytes < SMALLEST_SHARED or tensor.nbytes > 0.9 * room.f_bavail * room.f_frsize:
        return None
    handle, path = tempfile.mkstemp(dir=SHARED_MEMORY, prefix="recipes-")
    os.truncate(handle, tensor.nbytes)
    os.close(handle)
    return path


@cache
def _group_here() -> Any:
    """The processes of this machine; each machine has as many."""
    firsts = range(0, world_size(), local_world_size())
    groups = [distributed.new_group(list(range(first, first + local_world_size()))) for first in firsts]
    return groups[rank() // local_world_size()]


def world_mesh(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (world_size(),))


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that is cut over the processes; the tensor itself where it is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor with all of its parts. All processes must ask, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Each value summed over all processes, in float64."""
    if not distributed.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)  # on the CPU: gloo sums it, whatever computes
    distributed.all_reduce(total)
    return [float(value) for value in total]


def all_reduce_max(value: int) -> int:
    """The largest of all processes' values: the same in all of them."""
    if not distributed.is_initialized():
        return value
    largest = torch.tensor(int(value))
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)
