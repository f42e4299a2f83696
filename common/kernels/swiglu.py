"""SwiGLU (arXiv:2002.05202): silu(gate) * up, and its backward pass, which also recomputes the product.

With `gelu` it is GeGLU of the same paper, with the tanh approximation of GELU (arXiv:1606.08415, section 2). Because
(1 + tanh(t)) / 2 = sigmoid(2 t), both are gate * sigmoid(v) * up:

    silu:  v = gate
    gelu:  v = 2 * sqrt(2 / pi) * (gate + 0.044715 * gate^3)
"""

import math

import torch
from torch import Tensor

from common.kernels import constexpr, jit, register, tl, triton

BLOCK = 1024  # entries that one program computes
LINEAR = 2 * (2 / math.pi) ** 0.5  # the factors of gate and of its cube in GELU's v
CUBIC = LINEAR * 0.044715


def _swiglu(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    gate32 = gate.float()
    v = _gelu_argument(gate32)[0] if gelu else gate32
    return (gate32 * torch.sigmoid(v) * up.float()).to(gate.dtype)


def _gelu_argument(gate: Tensor) -> tuple[Tensor, Tensor]:
    """GELU's v, and dv / dgate."""
    square = gate.square()
    return gate * (LINEAR + CUBIC * square), LINEAR + 3 * CUBIC * square


def _swiglu_backward_(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    gate32, up32, grad32 = gate.float(), up.float(), grad.float()
    v, slope = _gelu_argument(gate32) if gelu else (gate32, 1.0)
    sigmoid = torch.sigmoid(v)
    activated = gate32 * sigmoid
    # d (gate * sigmoid(v)) / d gate = sigmoid + gate * sigmoid * (1 - sigmoid) * v'
    grad_gate = grad32 * up32 * (sigmoid + activated * (1 - sigmoid) * slope)
    product = (activated * up32).to(gate.dtype)
    grad.copy_(grad32 * activated)
    return product, grad_gate.to(gate.dtype)


@jit
def _swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, out_ptr, size, BLOCK: constexpr, GELU: constexpr, LINEAR: constexpr, CUBIC: constexpr
):
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < size
    gate = tl.load(gate_ptr + entries, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + entries, inside, other=0.0).to(tl.float32)
    v = gate
    if GELU:
        v = gate * (LINEAR + CUBIC * gate * gate)
    tl.store(out_ptr + entries, (gate * tl.sigmoid(v) * up).to(out_ptr.dtype.element_ty), inside)


@jit
def _swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    gate_ptr,
    up_ptr,
    product_ptr,
    grad_gate_ptr,
    size,
    BLOCK: constexpr,
    GELU: constexpr,
    LINEAR: constexpr,
    CUBIC: constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < size
    grad = tl.load(grad_ptr + entries, inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + entries, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + entries, inside, other=0.0).to(tl.float32)
    dtype = grad_ptr.dtype.element_ty
    v, slope = gate, 1.0
    if GELU:
        v = gate * (LINEAR + CUBIC * gate * gate)
        slope = LINEAR + 3 * CUBIC * gate * gate
    sigmoid = tl.sigmoid(v)
    activated = gate * sigmoid
    tl.store(product_ptr + entries, (activated * up).to(dtype), inside)
    tl.store(grad_gate_ptr + entries, (grad * up * (sigmoid + activated * (1 - sigmoid) * slope)).to(dtype), inside)
    tl.store(grad_ptr + entries, (grad * activated).to(dtype), inside)


def swiglu_triton(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    constants = {"BLOCK": BLOCK, "GELU": gelu, "LINEAR": LINEAR, "CUBIC": CUBIC}
    _swiglu_kernel[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), **constants)
    return out


def swiglu_backward_triton_(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    product, grad_gate = torch.empty_like(gate), torch.empty_like(gate)
    grid = (triton.cdiv(grad.numel(), BLOCK),)
    constants = {"BLOCK": BLOCK, "GELU": gelu, "LINEAR": LINEAR, "CUBIC": CUBIC}
    _swiglu_backward_kernel[grid](grad, gate, up, product, grad_gate, grad.numel(), **constants)
    return product, grad_gate


# Returns silu(gate) * up, or gelu(gate) * up, for tensors of equal shapes: computed in fp32, rounded once, contiguous.
swiglu = register(
    "swiglu(Tensor gate, Tensor up, bool gelu=False) -> Tensor",
    _swiglu,
    lambda gate, *_: torch.empty_like(gate),
    swiglu_triton,
)
# Returns the product again, and the gradient of gate. grad: the product's gradient, which is overwritten with that of
# up. All have one shape; grad is contiguous.
swiglu_backward_ = register(
    "swiglu_backward_(Tensor(a!) grad, Tensor gate, Tensor up, bool gelu=False) -> (Tensor, Tensor)",
    _swiglu_backward_,
    lambda grad, gate, *_: (torch.empty_like(gate), torch.empty_like(gate)),
    swiglu_backward_triton_,
)


def _swiglu_onto_(gate: Tensor, up: Tensor) -> None:
    gate.copy_(_swiglu(gate, up))


def swiglu_onto_triton_(gate: Tensor, up: Tensor) -> None:
    assert gate.is_contiguous()
    constants = {"BLOCK": BLOCK, "GELU": False, "LINEAR": LINEAR, "CUBIC": CUBIC}
    _swiglu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up.contiguous(), gate, gate.numel(), **constants)


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
    constants = {"BLOCK": BLOCK, "GELU": False, "LINEAR": LINEAR, "CUBIC": CUBIC}
    _swiglu_backward_kernel[grid](grad, gate, up, up, gate, grad.numel(), **constants)


# The same as swiglu_backward_, and nothing is allocated: grad is overwritten with the gradient of up, gate with its
# own, and up with the product. All are contiguous.
swiglu_backward_onto_ = register(
    "swiglu_backward_onto_(Tensor(a!) grad, Tensor(b!) gate, Tensor(c!) up) -> ()",
    _swiglu_backward_onto_,
    lambda grad, gate, up: None,
    swiglu_backward_onto_triton_,
)
