"""RMSNorm (arXiv:1910.07467) with a frozen weight. Saves only its input; backward recomputes the rest.

    y = weight * (x * rstd),  rstd = 1 / sqrt(mean(x^2) + eps)

It computes in fp32, and rounds to x's dtype before and after the multiplication by weight, as transformers does.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.kernels import constexpr, jit, next_power_of_2, register, tl


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True).add_(eps))
    return (x32 * rstd).to(x.dtype) * weight


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True).add_(eps))
    normed, scaled = x32 * rstd, grad.float() * weight.float()
    grad_x = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (grad_x if residual is None else grad_x + residual).to(x.dtype)


@jit
def _rms_norm_kernel(x_ptr, weight_ptr, y_ptr, size, eps, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + start + columns, inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    normed = (x * rstd).to(y_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + columns, (normed * weight).to(y_ptr.dtype.element_ty), inside)


@jit
def _rms_norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, weight_ptr, residual_ptr, out_ptr, size, eps, BLOCK: constexpr, HAS_RESIDUAL: constexpr
):
    start = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + start + columns, inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    normed = x * rstd
    weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
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


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _launch(_rms_norm_kernel, x, x, weight, y, eps=eps)
    return y


def rms_norm_backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    # A kernel takes a pointer in any case; with HAS_RESIDUAL=False it does not read it.
    pointer = x if residual is None else residual.contiguous()
    _launch(_rms_norm_backward_kernel, x, grad, x, weight, pointer, out, eps=eps, HAS_RESIDUAL=residual is not None)
    return out


# Returns y (rows, size) for x (rows, size) and weight (size,): contiguous, in x's dtype.
rms_norm_forward = register(
    "rms_norm_forward(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
    rms_norm_triton,
)
# Returns the gradient of x from `grad`, that of y; plus `residual`, the gradient that x has from elsewhere.
rms_norm_backward = register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, Tensor? residual=None) -> Tensor",
    _rms_norm_backward,
    lambda grad, x, weight, eps, residual=None: torch.empty_like(x, memory_format=torch.contiguous_format),
    rms_norm_backward_triton,
)


def _rms_norm_backward_onto_(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> None:
    residual.copy_(_rms_norm_backward(grad, x, weight, eps, residual))


def rms_norm_backward_onto_triton_(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> None:
    assert residual.is_contiguous()
    grad, x = grad.contiguous(), x.contiguous()
    _launch(_rms_norm_backward_kernel, x, grad, x, weight, residual, residual, eps=eps, HAS_RESIDUAL=True)


# The gradient as rms_norm_backward with a residual, written over the residual, which is contiguous.
rms_norm_backward_onto_ = register(
    "rms_norm_backward_onto_(Tensor grad, Tensor x, Tensor weight, float eps, Tensor(a!) residual) -> ()",
    _rms_norm_backward_onto_,
    lambda grad, x, weight, eps, residual: None,
    rms_norm_backward_onto_triton_,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.weight, ctx.eps = weight, eps
        ctx.save_for_backward(x)
        y: Tensor = rms_norm_forward(x, weight, eps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return rms_norm_backward(grad, x, ctx.weight, ctx.eps), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each row of x (rows, size) divided by its root mean square, times weight (size,). Differentiable in x."""
    y: Tensor = _RmsNorm.apply(x, weight, eps)
    return y
