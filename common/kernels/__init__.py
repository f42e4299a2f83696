"""The operators of the lean layers: one file each, with its PyTorch reference, its Triton kernel and its fake version.

They are registered with torch.library, so a plan on fake tensors, activation checkpointing and torch.compile see them.
On a GPU they run as Triton kernels; on a CPU, or where Triton is missing, as their references. Nothing here knows a
model.
"""

from collections.abc import Callable
from typing import Any

try:
    import triton
    from triton import language as tl
except ImportError:  # it comes with the CUDA build of torch only
    triton = tl = None

HAS_TRITON = triton is not None
constexpr: Any = tl.constexpr if HAS_TRITON else None  # the type of a kernel's arguments that are known at compile time


def jit(kernel: Callable[..., None]) -> Any:
    """The kernel compiled by Triton at its first launch; None where there is no Triton."""
    return triton.jit(kernel) if HAS_TRITON else None


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
