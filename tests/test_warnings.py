"""Warnings are errors in these tests, but for those that pyproject.toml names: here, of a GPU's first use."""

import warnings

import pytest

# As torch 2.13 writes them, from the sources that pyproject.toml names.
HARMLESS = (
    "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context... "
    "(Triggered internally at /pytorch/aten/src/ATen/cuda/CublasHandlePool.cpp:330.)",
    "expandable_segments not supported on this platform (Triggered internally at CUDAAllocatorConfig.h:35.)",
    "Can't initialize NVML",
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040). Please update",
)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_cuda_says_at_its_first_use_fails_no_test(text):
    warnings.warn(text, UserWarning, stacklevel=1)


@pytest.mark.parametrize("text", ["CUDA initialization: Unexpected error from cudaGetDeviceCount()", "something else"])
def test_any_other_warning_is_an_error(text):
    with pytest.raises(UserWarning, match=text[:20]):
        warnings.warn(text, UserWarning, stacklevel=1)
