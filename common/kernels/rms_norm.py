"""RMSNorm (arXiv:1910.07467) with a frozen weight. Saves only its input; backward recomputes the rest.

    y = weight * (x * rstd),  rstd = 1 / sqrt(mean(x^2) + eps)

It computes in fp32, and rounds to x's dtype before and after the multiplication by weight, as transformers does. With
`one_plus`, which is Gemma's norm, the factor is 1 + weight instead, and the product is rounded once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.kernels import constexpr, jit, next_power_of_2, register, tl


def _rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool = False, residual: Tensor | None = None) -> Tensor:
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True).add_(eps))
    y = x32 * rstd * (1 + weight.float()) if one_plus else (x32 * rstd).to(x.dtype) * weight
    return (y if residual is None else y + residual).to(x.dtype)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, one_plus: bool = False
) -> Tensor:
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True).add_(eps))
    normed, scaled = x32 * rstd, grad.float() * (weight.float() + one_plus)
    grad_x = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (grad_x if residual is None else grad_x + residual).to(x.dtype)


@jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    size,
    eps,
    BLOCK: constexpr,
    ONE_PLUS: constexpr,
    HAS_RESIDUAL: constexpr,
):
    start = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + start + columns, inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
    if ONE_PLUS:
        y = x * rstd * (1 + weight)
    else:
        y = (x * rstd).to(y_ptr.dtype.element_ty).to(tl.float32) * weight
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + start + columns, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + columns, y.to(y_ptr.dtype.element_ty), inside)


@jit
def _rms_norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    size,
    eps,
    BLOCK: constexpr,
    ONE_PLUS: constexpr,
    HAS_RESIDUAL: constexpr,
):
    start = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + start + columns, inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    normed = x * rstd
    weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
    if ONE_PLUS:
        weight += 1
    scaled = tl.load(grad_ptr + start + columns, inside, other=0.0).to(tl.float32) * weight
    out = rstd * (scaled - normed * (tl.sum(scaled * normed, 0) / size))
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + start + columns, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + columns, out.to(out_ptr.dtype.element_ty), inside)


def _launch(kernel: Any, x: Tensor, *tensors: Tensor, eps: float, **constants: bool) -> None:
    """Launches one program for each row of x, which holds the row in registers."""
    size = x.shape[-1]
    block = next_power_of_2(size)
    warps = min(max(block // 512, 1), 16)
    kernel[(x.numel() // size,)](*tensors, size, eps, BLOCK=block, num_warps=warps, **constants)


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, one_plus: bool = False, residual: Tensor | None = None
) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    # A kernel takes a pointer in any case; with HAS_RESIDUAL=False it does not read it.
    pointer = x if residual is None else residual.contiguous()
    constants = {"ONE_PLUS": one_plus, "HAS_RESIDUAL": residual is not None}
    _launch(_rms_norm_kernel, x, x, weight, pointer, y, eps=eps, **constants)
    return y


def rms_norm_backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, one_plus: bool = False
) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    pointer = x if residual is None else residual.contiguous()
    constants = {"ONE_PLUS": one_plus, "HAS_RESIDUAL": residual is not None}
    _launch(_rms_norm_backward_kernel, x, grad, x, weight, pointer, out, eps=eps, **constants)
    return out


# Returns y (rows, size) for x (rows, size) and weight (size,): contiguous, in x's dtype. `residual` (rows, size) is
# added to y before it is rounded.
rms_norm_forward = register(
    "rms_norm_forward(Tensor x, Tensor weight, float eps, bool one_plus=False, Tensor? residual=None) -> Tensor",
    _rms_norm,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    rms_norm_triton,
)
# Returns the gradient of x from `grad`, that of y; plus `residual`, the gradient that x has from elsewhere.
rms_norm_backward = register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, Tensor? residual=None, bool one_plus=False) "
    "-> Tensor",
    _rms_norm_backward,
    lambda grad, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    rms_norm_backward_triton,
)


def _rms_norm_backward_onto_(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> None:
    residual.copy_(_rms_norm_backward(grad, x, weight, eps, residual))


def rms_norm_backward_onto_triton_(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> None:
    assert residual.is_contiguous()
    grad, x = grad.contiguous(), x.contiguous()
    constants = {"ONE_PLUS": False, "HAS_RESIDUAL": True}
    _launch(_rms_norm_backward_kernel, x, grad, x, weight, residual, residual, eps=eps, **constants)


# The gradient as rms_norm_backward with a residual, written over the residual, which is contiguous.
rms_norm_backward_onto_ = register(
    "rms_norm_backward_onto_(Tensor grad, Tensor x, Tensor weight, float eps, Tensor(a!) residual) -> ()",
    _rms_norm_backward_onto_,
    lambda grad, x, weight, eps, residual: None,
    rms_norm_backward_onto_triton_,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, one_plus: bool, residual: Tensor | None) -> Tensor:
        ctx.weight, ctx.eps, ctx.one_plus = weight, eps, one_plus
        ctx.save_for_backward(x)
        y: Tensor = rms_norm_forward(x, weight, eps, one_plus, residual)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        of_residual = grad if ctx.needs_input_grad[4] else None
        return rms_norm_backward(grad, x, ctx.weight, ctx.eps, None, ctx.one_plus), None, None, None, of_residual


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool = False, residual: Tensor | None = None) -> Tensor:
    """Each row of x (rows, size) divided by its root mean square, times weight (size,) or 1 + weight; plus residual.

    residual: (rows, size). Differentiable in x and residual. Saves x.
    """
    y: Tensor = _RmsNorm.apply(x, weight, eps, one_plus, residual)
    return y
