"""Reads tensors once a machine, for all of its processes."""

import os
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed

from common.machine.collectives import group_of_this_machine
from common.machine.processes import local_rank, local_world_size, rank

SHARED_MEMORY = "/dev/shm"
MIN_SHARED_BYTES = 1 << 20  # smaller tensors are sent


def read_once_per_machine(device: torch.device, read: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """Calls read(*arguments) in the first process of each machine. Returns its tensors in all processes, on `device`.

    On a CPU the processes of a machine share the tensors' memory, which must not be written to.
    """
    if local_world_size() == 1:
        return [tensor.to(device) for tensor in read(*arguments)]
    is_first = local_rank() == 0
    first, group = rank() - local_rank(), _group_of_this_machine()
    tensors = [tensor.to(device).contiguous() for tensor in read(*arguments)] if is_first else []
    headers: list[Any] = [[(tensor.shape, tensor.dtype, _make_shared_file(tensor)) for tensor in tensors]]
    distributed.broadcast_object_list(headers, first, group, device=torch.device("cpu"))
    received = []
    for number, (shape, dtype, path) in enumerate(headers[0]):
        if path:
            shared = torch.from_file(path, shared=True, size=shape.numel(), dtype=dtype).view(shape)
            if is_first:
                shared.copy_(tensors[number])
                tensors[number] = shared
            distributed.barrier(group)  # every process has opened the file, and the tensor is in it
            if is_first:
                os.unlink(path)
        else:
            shared = tensors[number] if is_first else torch.empty(shape, dtype=dtype, device=device)
            distributed.broadcast(shared, first, group)
        received.append(shared)
    return received


def _make_shared_file(tensor: Tensor) -> str | None:
    """Makes an empty file in memory that has room for the tensor, and returns its path.

    Returns None for a tensor on a GPU, for a small one, and where that memory has too little room.
    """
    if tensor.is_cuda or not os.path.isdir(SHARED_MEMORY):
        return None
    room = os.statvfs(SHARED_MEMORY)
    if tensor.nbytes < MIN_SHARED_BYTES or tensor.nbytes > 0.9 * room.f_bavail * room.f_frsize:
        return None
    descriptor, path = tempfile.mkstemp(dir=SHARED_MEMORY, prefix="recipes-")
    os.truncate(descriptor, tensor.nbytes)
    os.close(descriptor)
    return path


@cache
def _group_of_this_machine() -> Any:
    return group_of_this_machine()
