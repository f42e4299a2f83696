"""The operators of lean layers and loss: one file each, with its PyTorch reference, Triton kernel and fake version.

They are registered with torch.library, for the whole process and under names of our own (torch.ops.common), so a plan
on fake tensors, activation checkpointing and torch.compile see them. On a GPU they run as Triton kernels; on a CPU, or
where Triton cannot launch any, as their references. Nothing here knows a model. The operators have no gradient:
autograd functions call them, and decide what is saved for backward.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from common.kernels.triton_check import why_no_triton

try:
    import triton
    from triton import language as tl
except ImportError:  # Triton comes with the CUDA build of torch only
    triton = tl = None

HAS_TRITON = triton is not None
constexpr: Any = tl.constexpr if HAS_TRITON else None  # the type of the arguments that a kernel is compiled for


def jit(kernel: Callable[..., None]) -> Any:
    """Lets Triton compile the kernel at its first launch; None where there is no Triton."""
    return triton.jit(kernel) if HAS_TRITON else None


_LIBRARY = torch.library.Library("common", "FRAGMENT")
REFERENCES: dict[Any, Callable[..., Any]] = {}  # by operator: what it computes, in PyTorch
KERNELS: dict[Any, Callable[..., Any]] = {}  # by operator: the same by Triton kernels


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], kernel: Callable[..., Any]) -> Any:
    """Registers the operator torch.ops.common.<name>: it runs `kernel` on a GPU if Triton can, else `reference`.

    schema: as torch.library takes it, beginning with the name. fake: returns empty tensors of the right shapes.
    It uses torch.library's lower level: torch.library.custom_op costs 12 us more a call, ten times in each layer.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if HAS_TRITON:
        _LIBRARY.impl(name, kernel_or_reference(kernel, reference), "CUDA")
    torch.library.register_fake(f"common::{name}", fake)
    operator = getattr(torch.ops.common, name).default
    REFERENCES[operator], KERNELS[operator] = reference, kernel
    return operator


def kernel_or_reference(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the kernel, or the reference where Triton cannot launch kernels; it asks when called."""

    def run(*arguments: Any, **named: Any) -> Any:
        return (kernel if why_no_triton() is None else reference)(*arguments, **named)

    return run


@cache
def say_references_run(reason: str) -> None:
    """Prints, the first time, that references run in the place of kernels on this GPU. reason: of why_no_triton."""
    print(f"layers: in plain PyTorch operators, slower and with more memory, because {reason}")


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
