"""Host memory that the processes of a machine share: what is read, or filled, once for all of them.

It is a file that the kernel keeps in memory and that has no name (memfd_create): the first process makes it, and the
others open it below /proc. So nothing of it lies on a disk, the size of /dev/shm, 64 MiB in many containers, is no
limit, and the kernel frees it with the last process, however that ends.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed

from common.machine.collectives import (
    NO_LIMIT,
    all_on_machine,
    barrier_on_machine,
    broadcast_on_machine,
    group_of_this_machine,
)
from common.machine.device import available_ram
from common.machine.host_memory import empty_on_host, lock_pages
from common.machine.processes import local_rank, local_world_size, rank

MIN_SHARED_BYTES = 1 << 20  # smaller tensors are sent


def shared_memory(size: int) -> Tensor | None:
    """Host memory of `size` bytes that all processes of this machine share: uint8 (size,), zeros.

    All of them must call it. None in all of them where the system does not let them share it, and in a run of one
    process. Raises MemoryError in all of them when there is no memory for it.
    """
    if local_world_size() == 1 or not distributed.is_initialized():
        return None
    path, descriptor, available = "", -1, None
    if local_rank() == 0:
        available = available_ram()
        try:
            descriptor = os.memfd_create("weights")
            os.truncate(descriptor, size)
            path = f"/proc/{os.getpid()}/fd/{descriptor}"
        except (OSError, AttributeError):  # an old kernel, or another system
            pass
    path, available = broadcast_on_machine((path, available))
    if available is not None and available < size:
        raise MemoryError(f"{size:,} bytes of shared memory, and {available:,} are available")
    block = None
    if path:
        try:
            block = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        except RuntimeError:  # another container has the processes, or may not look into the first one's
            pass
    shared = all_on_machine(block is not None)  # and every process has opened it
    if descriptor >= 0:
        os.close(descriptor)
    return block if shared else None


def fill_once_per_machine(size: int, fill: Callable[[Tensor], None], like: Tensor) -> Tensor:
    """Host memory of `size` bytes that has what `fill` writes: uint8 (size,), page-locked where `like` is on a GPU.

    The processes of a machine share it, and the first of them fills it: all must call this, for the same content. It
    must not be written to. Where it cannot be shared, each process has its own. Raises MemoryError, or torch's
    RuntimeError, when there is no memory.
    """
    block = shared_memory(size)
    if block is None:
        if distributed.is_initialized() and local_world_size() > 1:
            _report_own_copies(local_world_size())
        block = empty_on_host(size, like)
        fill(block)
        return block
    if like.is_cuda:
        lock_pages(block, like.device)
    if local_rank() == 0:
        fill(block)
    barrier_on_machine()
    return block


@cache  # once
def _report_own_copies(processes: int) -> None:
    print(
        f"the {processes} processes of this machine cannot share host memory (memfd_create, /proc): each has its own "
        f"copy of the weights that wait there, {processes} times what the plan counts"
    )


def read_once_per_machine(device: torch.device, read: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """Calls read(*arguments) in the first process of each machine. Returns its tensors in all processes, on `device`.

    On a CPU the processes of a machine share the tensors' memory, which must not be written to.
    """
    if local_world_size() == 1:
        return [tensor.to(device) for tensor in read(*arguments)]
    is_first = local_rank() == 0
    first, group = rank() - local_rank(), _group_of_this_machine()
    tensors = [tensor.to(device).contiguous() for tensor in read(*arguments)] if is_first else []
    headers = broadcast_on_machine([(tensor.shape, tensor.dtype, tensor.nbytes) for tensor in tensors])
    received = []
    for number, (shape, dtype, size) in enumerate(headers):
        block = shared_memory(size) if device.type == "cpu" and size >= MIN_SHARED_BYTES else None
        if block is not None:
            tensor = block.view(dtype).view(shape)
            if is_first:
                tensor.copy_(tensors[number])
                tensors[number] = tensor  # frees the one that was read
            barrier_on_machine()
        else:
            tensor = tensors[number] if is_first else torch.empty(shape, dtype=dtype, device=device)
            distributed.broadcast(tensor, first, group)
        received.append(tensor)
    return received


@cache
def _group_of_this_machine() -> Any:
    return group_of_this_machine(timeout=NO_LIMIT)
