"""The operators of the lean layers: one file each, with its PyTorch reference, its Triton kernel and its fake version.

They are registered with torch.library, so a plan on fake tensors, activation checkpointing and torch.compile see them.
On a GPU they run as Triton kernels; on a CPU, or where Triton is missing, as their references. Nothing here knows a
model. They have no gradient of their own: the autograd functions that use them say what is saved.
"""

from collections.abc import Callable
from typing import Any

import torch

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


_LIBRARY = torch.library.Library("common", "FRAGMENT")
REFERENCES: dict[Any, Callable[..., Any]] = {}  # each operator's meaning, in PyTorch's own


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], kernel: Callable[..., Any]) -> Any:
    """The operator torch.ops.common.<name> with this schema: `kernel` on a GPU with Triton, else `reference`.

    With torch.library's lower level: torch.library.custom_op costs 12 us more a call, ten times in each layer.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if HAS_TRITON:
        _LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"common::{name}", fake)
    operator = getattr(torch.ops.common, name).default
    REFERENCES[operator] = reference
    return operator


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
