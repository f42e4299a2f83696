"""Tells out of memory from other errors, and of which memory: most that run out of it raise no OutOfMemoryError."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Memory = Literal["GPU", "host"]

# What torch 2.13, NCCL and Triton 3.7 say of CUDA's runtime and driver:
#   CUDA out of memory. Tried to allocate 2.00 GiB ... (torch.OutOfMemoryError: the allocator)
#   CUDA error: out of memory                          (torch.AcceleratorError: a kernel that is loaded at its launch)
#   CUDA driver error: out of memory                   (RuntimeError: expandable segments)
#   Cuda failure 2 'out of memory'                     (torch.distributed.DistBackendError)
#   Triton Error [CUDA]: out of memory                 (RuntimeError)
#   CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`, on some drivers ..._NOT_INITIALIZED
# In another call than this NOT_INITIALIZED means that the GPU cannot be used any more.
_GPU = re.compile(
    r"cuda.*out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED when calling `cublas(Lt)?Create\(",
    re.IGNORECASE,
)
_HOST = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory \(os error 12\)")


def out_of_memory(error: BaseException) -> Memory | None:
    """Which memory did not suffice; None when the error is another one.

    A GPU can be used after it ran out of memory, and not after errors such as an illegal access, which are None.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "host"
    text, kind = str(error), type(error).__name__
    if kind == "OutOfMemoryError" or (kind == "CudaError" and text.startswith("out of memory")):  # both torch's
        return "GPU"
    if not isinstance(error, RuntimeError | OSError):
        return None
    return "GPU" if _GPU.search(text) else "host" if _HOST.search(text) else None


@contextmanager
def allocating_on_host() -> Iterator[None]:
    """Turns CUDA's out of memory in a block that pins host memory into a MemoryError: CUDA has one text for both."""
    failure = None
    try:
        yield
    except RuntimeError as error:
        # torch.OutOfMemoryError is the allocator's of the GPU in any case.
        if out_of_memory(error) != "GPU" or type(error).__name__ == "OutOfMemoryError":
            raise
        failure = MemoryError(f"pinned host memory: {error}")
    if failure is not None:
        raise failure


def without_frames(error: BaseException) -> BaseException:
    """The error without its causes, and without the frames that it passed: both hold tensors."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
