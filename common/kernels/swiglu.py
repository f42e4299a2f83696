"""SwiGLU (arXiv:2002.05202): silu(gate) * up, and its backward pass, which also recomputes the product."""

import torch
from torch import Tensor

from common.kernels import constexpr, jit, register, tl, triton

BLOCK = 1024  # entries that one program computes


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate32 = gate.float()
    return (gate32 * torch.sigmoid(gate32) * up.float()).to(gate.dtype)


def _swiglu_backward_(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate32, up32, grad32 = gate.float(), up.float(), grad.float()
    sigmoid = torch.sigmoid(gate32)
    silu = gate32 * sigmoid
    # d silu / d gate = sigmoid + gate * sigmoid * (1 - sigmoid)
    grad_gate = grad32 * up32 * (sigmoid + silu * (1 - sigmoid))
    product = (silu * up32).to(gate.dtype)
    grad.copy_(grad32 * silu)
    return product, grad_gate.to(gate.dtype)


@jit
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, size, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < size
    gate = tl.load(gate_ptr + entries, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + entries, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + entries, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), inside)


@jit
def _swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, gate_ptr, up_ptr, product_ptr, grad_gate_ptr, size, BLOCK: constexpr
):
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < size
    grad = tl.load(grad_ptr + entries, inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + entries, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + entries, inside, other=0.0).to(tl.float32)
    dtype = grad_ptr.dtype.element_ty
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(product_ptr + entries, (silu * up).to(dtype), inside)
    tl.store(grad_gate_ptr + entries, (grad * up * (sigmoid + silu * (1 - sigmoid))).to(dtype), inside)
    tl.store(grad_ptr + entries, (grad * silu).to(dtype), inside)


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _swiglu_kernel[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK)
    return out


def swiglu_backward_triton_(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    product, grad_gate = torch.empty_like(gate), torch.empty_like(gate)
    grid = (triton.cdiv(grad.numel(), BLOCK),)
    _swiglu_backward_kernel[grid](grad, gate, up, product, grad_gate, grad.numel(), BLOCK=BLOCK)
    return product, grad_gate


# Returns silu(gate) * up for tensors of equal shapes: computed in fp32, rounded once, contiguous.
swiglu = register(
    "swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, lambda gate, up: torch.empty_like(gate), swiglu_triton
)
# Returns the product again, and the gradient of gate. grad: the product's gradient, which is overwritten with that of
# up. All have one shape; grad is contiguous.
swiglu_backward_ = register(
    "swiglu_backward_(Tensor(a!) grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _swiglu_backward_,
    lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(gate)),
    swiglu_backward_triton_,
)


def _swiglu_onto_(gate: Tensor, up: Tensor) -> None:
    gate.copy_(_swiglu(gate, up))


def swiglu_onto_triton_(gate: Tensor, up: Tensor) -> None:
    assert gate.is_contiguous()
    _swiglu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up.contiguous(), gate, gate.numel(), BLOCK=BLOCK)


# The product as swiglu, written over gate, which is contiguous.
swiglu_onto_ = register(
    "swiglu_onto_(Tensor(a!) gate, Tensor up) -> ()", _swiglu_onto_, lambda gate, up: None, swiglu_onto_triton_
)


def _swiglu_backward_onto_(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    product, grad_gate = _swiglu_backward_(grad, gate, up)
    gate.copy_(grad_gate)
    up.copy_(product)


def swiglu_backward_onto_triton_(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    assert grad.is_contiguous() and gate.is_contiguous() and up.is_contiguous()
    grid = (triton.cdiv(grad.numel(), BLOCK),)
    _swiglu_backward_kernel[grid](grad, gate, up, up, gate, grad.numel(), BLOCK=BLOCK)


# The same as swiglu_backward_, and nothing is allocated: grad is overwritten with the gradient of up, gate with its
# own, and up with the product. All are contiguous.
swiglu_backward_onto_ = register(
    "swiglu_backward_onto_(Tensor(a!) grad, Tensor(b!) gate, Tensor(c!) up) -> ()",
    _swiglu_backward_onto_,
    lambda grad, gate, up: None,
    swiglu_backward_onto_triton_,
)
