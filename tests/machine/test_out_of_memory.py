"""What counts as out of memory: texts and types as torch 2.13, NCCL and Triton 3.7 raise them."""

import errno
import re

import numpy as np
import pytest
import torch

from common.exit_status import exit_status
from common.machine.launch import ERROR_STATUS
from common.machine.out_of_memory import allocating_on_host, out_of_memory, without_frames
from common.recipe import UserError

ADVICE = "\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda for more information.\n"
NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version "
    "2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
)
CudaError = type("CudaError", (RuntimeError,), {})  # torch.cuda's own asks the CUDA runtime for its text
OF_GPU = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB"),
    torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory"),
    torch.AcceleratorError(f"CUDA error: out of memory{ADVICE}"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    torch.distributed.DistBackendError(NCCL),
    CudaError("out of memory (2)"),
]
OTHERS = [
    torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{ADVICE}"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasGemmEx( handle, opa, opb)`"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376."),
    OSError(errno.ENOSPC, "No space left on device"),
    UserError("CUDA out of memory, says the user's file"),
    KeyError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", OF_GPU, ids=lambda error: str(error)[:40])
def test_a_gpu_runs_out_of_memory_in_many_words(error):
    assert out_of_memory(error) == "GPU"


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:40])
def test_an_error_after_which_a_gpu_is_lost_or_memory_would_not_help_is_another(error):
    assert out_of_memory(error) is None


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
        lambda: np.empty(1 << 60, dtype=np.uint8),
        lambda: bytearray(1 << 62),
        lambda: (_ for _ in ()).throw(OSError(errno.ENOMEM, "Cannot allocate memory")),
    ],
    ids=["torch", "numpy", "Python", "the system"],
)
def test_the_host_runs_out_of_memory(allocate):
    with pytest.raises((RuntimeError, MemoryError, OSError)) as raised:
        allocate()
    assert out_of_memory(raised.value) == "host"


def test_what_cuda_says_of_pinned_memory_is_the_hosts():
    with pytest.raises(MemoryError, match="pinned host memory: CUDA error: out of memory") as raised:
        with allocating_on_host():
            raise torch.AcceleratorError("CUDA error: out of memory")
    assert out_of_memory(raised.value) == "host"
    with allocating_on_host():
        pass
    for error in (OF_GPU[0], *OTHERS[:3]):  # the GPU's allocator names its own memory; and other errors pass
        with pytest.raises(type(error), match=re.escape(str(error))), allocating_on_host():
            raise error


def test_an_error_without_frames_holds_nothing():
    def fail():
        try:
            raise ValueError("the cause")
        except ValueError as cause:
            raise MemoryError from cause

    with pytest.raises(MemoryError) as raised:
        fail()
    error = without_frames(raised.value)
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OF_GPU[2], "error: out of GPU memory. nvidia-smi shows what else uses the card: .* CUDA error: out of memory"),
        (MemoryError(), "error: out of host memory. free -h shows what is left of it: .* take a machine with more.$"),
    ],
    ids=["GPU", "host"],
)
def test_a_command_that_runs_out_of_memory_ends_with_a_line(error, line, capsys):
    assert exit_status(lambda: (_ for _ in ()).throw(error), "out") == ERROR_STATUS
    err = capsys.readouterr().err.strip()
    assert re.match(line, err) and "\n" not in err


def test_a_gpu_that_is_lost_passes_with_its_traceback():
    with pytest.raises(torch.AcceleratorError):
        exit_status(lambda: (_ for _ in ()).throw(OTHERS[0]), "out")
