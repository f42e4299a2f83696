"""Host memory that a GPU copies from and to: page-locked, and in its exact size.

Only from page-locked memory, and to it, does a GPU copy beside its computation. torch's allocator of such memory rounds
up to powers of two and keeps what is freed (20 MiB take 32), unless PYTORCH_ALLOC_CONF tells it up to which size. The
value of common/process_state.py makes all larger blocks exact, and gives them back to the system when they are freed.
Locking takes 0.1 to 0.3 ms a MiB (published, not measured here), so what is used in every step is taken once and kept.
"""

import contextlib
import os
import re
import weakref
from functools import cache

import torch
from torch import Tensor
from torch.library import custom_op

from common.machine.device import available_ram
from common.machine.out_of_memory import allocating_on_host

HOST_REGISTER_PORTABLE = 1  # page-locked for every GPU: cudaHostRegisterPortable, CUDA runtime API


def page_locked_bytes(size: int) -> int:
    """Bytes that torch takes for a page-locked block of `size` bytes, by its settings in the environment.

    The next power of two up to the smaller of two limits, pinned_max_round_threshold_mb and pinned_max_cached_size_mb,
    and exactly `size` above it. Source: torch 2.13, ATen/core/CachingHostAllocator.h, `allocate`. The variable for CUDA
    hides the general one, also when it is empty.
    """
    general = os.environ.get("PYTORCH_ALLOC_CONF", "")
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", general)
    limits = re.findall(r"pinned_max_(?:round_threshold|cached_size)_mb\s*:\s*(\d+)", settings)
    if size == 0 or (limits and size > min(map(int, limits)) << 20):
        return size
    return 1 << (size - 1).bit_length()


def page_locked(size: int) -> Tensor:
    """Host memory of `size` bytes for copies to and from a GPU: uint8 (size,), on the CPU.

    Dropping it is safe at any time: torch gives it back when no copy uses it any more. Where the system does not lock
    it, though it has the memory, it is ordinary memory, and a line says once what that costs. Raises MemoryError, or
    torch's RuntimeError, when there is no memory for it.
    """
    try:
        with allocating_on_host():
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except (RuntimeError, MemoryError) as error:
        available = available_ram()
        if available is not None and available < size:
            raise
        _report_refusal(str(error).splitlines()[0])
    return torch.empty(size, dtype=torch.uint8)


def lock_pages(block: Tensor, device: torch.device) -> None:
    """Page-locks host memory that torch's allocator did not give out, until it is dropped. device: the GPU that copies.

    Dropping it is safe at any time: that waits for the GPU. Where the system refuses, a line says once what that costs.
    """
    runtime, address = torch.cuda.cudart(), block.data_ptr()
    status = runtime.cudaHostRegister(address, block.nbytes, HOST_REGISTER_PORTABLE)
    if int(status):
        # CUDA keeps the error for whoever asks next, which is torch after its next kernel. Asking clears it.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=device)
        _report_refusal(f"cudaHostRegister: {runtime.cudaGetErrorString(status)}")
    else:
        weakref.finalize(block.untyped_storage(), _unlock_pages, address, device).atexit = False


def _unlock_pages(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may be under way
    torch.cuda.cudart().cudaHostUnregister(address)


@cache  # once
def _report_refusal(reason: str) -> None:
    print(
        f"host memory cannot be page-locked ({reason}): what waits there is copied the slower way, and computing waits "
        "for it. A container or WSL may limit it (ulimit -l)"
    )


@custom_op("common::empty_on_host", mutates_args=())
def empty_on_host(size: int, like: Tensor) -> Tensor:
    """`page_locked`, as an operator: so a plan, whose fake tensors are all on one device, knows what is on the host.

    like: a tensor that will be copied there, or from there. Ordinary memory where it is on no GPU.
    """
    return page_locked(size) if like.is_cuda else torch.empty(size, dtype=torch.uint8)


@empty_on_host.register_fake
def _(size: int, like: Tensor) -> Tensor:
    return like.new_empty(size, dtype=torch.uint8, device="cpu")
