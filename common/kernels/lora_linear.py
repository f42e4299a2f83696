"""LoRA linear layers over frozen 4-bit weights, fused with what stands before and after them in a decoder layer.

One layer computes, in plain PyTorch (`lora_linear_reference`, which the tests compare with):

    z = x @ A.T
    y = x @ W.T + bias
    return y + scale * z @ B.T

The functions here compute the same in another order, to save memory and passes over it:

- The LoRA branch comes first, and the frozen matmul accumulates into it (cuBLAS' own addmm).
- W is dequantized anew for each matmul, and freed after it.
- Only inputs are saved for backward. Backward recomputes the RMS norm, silu(gate) * up, and z.

They are autograd functions over operators that others see (matmuls, bitsandbytes' dequantization, those of this
folder), so a plan counts what a run allocates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.kernels.nf4_dequantize import is_supported, nf4_dequantize
from common.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from common.kernels.swiglu import swiglu, swiglu_backward_


@dataclass(frozen=True)
class LoraLinear:
    """The tensors of one layer: y = x W^T + bias + scale * (x A^T) B^T; without an adapter the first two terms."""

    weight: Tensor  # W, frozen: (out, in), or its packed 4-bit form, in any dtype, with its scales in `quant_state`
    bias: Tensor | None = None  # frozen, (out,)
    a: Tensor | None = None  # (rank, in), any float dtype; cast to that of x at use
    b: Tensor | None = None  # (out, rank)
    scale: float = 1.0
    quant_state: Any = None  # bitsandbytes' QuantState of a packed weight; None takes the weight's own

    @property
    def out_features(self) -> int:
        """The rows of W."""
        state = self.quant_state or getattr(self.weight, "quant_state", None)
        return int((self.weight if state is None else state).shape[0])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W (out, in), dequantized anew; without a copy where it is stored in `dtype`."""
        state = self.quant_state or getattr(self.weight, "quant_state", None)
        if state is None:
            return self.weight.detach().to(dtype)
        packed = self.weight.detach()
        if packed.dtype != torch.uint8:  # stored as the model's dtype, so that FSDP2 can shard them together
            packed = packed.view(torch.uint8)
        if is_supported(state, dtype):
            outer = state.state2
            codes_and_scales = state.absmax, state.code, outer.absmax, outer.code, state.offset
            weight: Tensor = nf4_dequantize(packed, *codes_and_scales, state.shape, dtype)
            return weight
        ops, absmax = torch.ops.bitsandbytes, state.absmax
        if state.nested:  # double quantization: the scales are quantized too
            outer = state.state2
            absmax = ops.dequantize_blockwise(absmax, outer.absmax, outer.code, outer.blocksize, torch.float32).add_(
                state.offset
            )
        return ops.dequantize_4bit(packed, absmax, state.blocksize, state.quant_type, state.shape, dtype)

    def scaled_b(self, dtype: torch.dtype) -> Tensor:
        """scale * B (out, rank)."""
        assert self.b is not None
        return (self.b.detach() if self.scale == 1 else self.b.detach() * self.scale).to(dtype)


def dequantize_all(linears: Sequence[LoraLinear], dtype: torch.dtype) -> list[LoraLinear]:
    """The same layers with their weights in `dtype`, for several uses in one pass: `dequantize` then copies nothing."""
    return [replace(linear, weight=linear.dequantize(dtype), quant_state=None) for linear in linears]


def lora_linear_reference(x: Tensor, linear: LoraLinear) -> Tensor:
    """What a layer computes for x (tokens, in): (tokens, out). Plain PyTorch, differentiable in x, A and B."""
    y = torch.nn.functional.linear(x, linear.dequantize(x.dtype), linear.bias)
    if linear.a is None or linear.b is None:
        return y
    z = x @ linear.a.to(x.dtype).t()
    return y + linear.scale * z @ linear.b.to(x.dtype).t()


def _concatenate(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """The tensors among the parts as one; None where all parts are None."""
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0] if tensors else None


@dataclass(frozen=True)
class AdapterCopies:
    """The adapters of layers with a common input as their matmuls take them, in the dtype of the compute."""

    a: Tensor | None  # A of all layers, (sum of ranks, in), so that one matmul with the input gives every z
    b: list[Tensor | None]  # scale * B of each layer, (out, rank)


def copy_adapters(linears: Sequence[LoraLinear], dtype: torch.dtype) -> AdapterCopies:
    """Casts, scales and stacks. The copies are right until an adapter changes; what need not be copied is no copy."""
    a = _concatenate([None if linear.a is None else linear.a.detach().to(dtype) for linear in linears], 0)
    return AdapterCopies(a, [None if linear.b is None else linear.scaled_b(dtype) for linear in linears])


def _split_by_rank(stacked: Tensor | None, linears: Sequence[LoraLinear], dim: int) -> list[Tensor | None]:
    """The part of each layer in a tensor with the sum of ranks along `dim`; None for a layer without an adapter."""
    if stacked is None:
        return [None for _ in linears]
    parts = iter(stacked.split([len(linear.a) for linear in linears if linear.a is not None], dim))
    return [None if linear.a is None else next(parts) for linear in linears]


def _add_optional(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None:
        return y
    return x if y is None else x + y


def _addmm_optional(base: Tensor | None, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight, out=out) if base is None else torch.addmm(base, x, weight, out=out)


def lora_forward(
    x: Tensor,
    linears: Sequence[LoraLinear],
    copies: AdapterCopies | None,
    residual: Tensor | None = None,
    outs: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """The layers' outputs for their common input x (tokens, in), each (tokens, out), plus `residual` (tokens, out).

    outs: where to write each of them, such as rows of a larger tensor; None allocates.
    """
    copies = copies or copy_adapters(linears, x.dtype)
    lora_a_out = _split_by_rank(None if copies.a is None else x @ copies.a.t(), linears, 1)
    outputs = []
    outs = outs or [None] * len(linears)
    for linear, z, b, out in zip(linears, lora_a_out, copies.b, outs, strict=True):  # z = x A^T; None: no adapter
        base = _add_optional(residual, linear.bias)
        if z is None or b is None:
            weight = linear.dequantize(x.dtype)
            outputs.append(_addmm_optional(base, x, weight.t(), out))
        else:
            branch = _addmm_optional(base, z, b.t(), out)
            outputs.append(branch.addmm_(x, linear.dequantize(x.dtype).t()))  # accumulates into the LoRA branch
    return outputs


def backward_to_input(
    grads: Sequence[Tensor], linears: Sequence[LoraLinear], copies: AdapterCopies
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the common input, and that of every z, (tokens, sum of ranks)."""
    grad_z = _concatenate([None if b is None else grad @ b for grad, b in zip(grads, copies.b, strict=True)], 1)
    grad_x = None if copies.a is None or grad_z is None else grad_z @ copies.a
    for grad, linear in zip(grads, linears, strict=True):
        weight = linear.dequantize(grad.dtype)
        grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
        del weight  # before the next one is dequantized
    assert grad_x is not None
    return grad_x, grad_z


def backward_to_adapters(
    x: Tensor, grads: Sequence[Tensor], grad_z: Tensor | None, linears: Sequence[LoraLinear], copies: AdapterCopies
) -> list[Tensor | None]:
    """The gradients of A and B of each layer in turn, in their own dtype; None without an adapter."""
    a = copies.a
    if a is None or grad_z is None:
        return [None] * (2 * len(linears))
    grads_of_a = _split_by_rank(grad_z.t() @ x, linears, 0)
    found: list[Tensor | None] = []
    for linear, grad, z, grad_a in zip(linears, grads, _split_by_rank(x @ a.t(), linears, 1), grads_of_a, strict=True):
        if linear.a is None or linear.b is None or z is None or grad_a is None:
            found += [None, None]
            continue
        grad_b = (grad.t() @ z).to(linear.b.dtype)
        found += [grad_a.to(linear.a.dtype), grad_b if linear.scale == 1 else grad_b * linear.scale]
    return found


def adapters_of(linears: Sequence[LoraLinear]) -> list[Tensor | None]:
    """A and B of each layer in turn: an autograd function takes as arguments what it gives gradients for."""
    return [adapter for linear in linears for adapter in (linear.a, linear.b)]


class _RmsNormLoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        eps: float,
        linears: Sequence[LoraLinear],
        copies: AdapterCopies | None,
        one_plus: bool,
        *_: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.norm, ctx.linears, ctx.copies = (weight, eps, one_plus), linears, copies
        ctx.save_for_backward(hidden)
        return *lora_forward(rms_norm_forward(hidden, *ctx.norm), linears, copies), hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        *grads, residual_grad = grads  # type: ignore[assignment]
        copies = ctx.copies or copy_adapters(ctx.linears, hidden.dtype)
        grad, grad_z = backward_to_input(grads, ctx.linears, copies)
        weight, eps, one_plus = ctx.norm
        normed = rms_norm_forward(hidden, weight, eps, one_plus)
        adapters = backward_to_adapters(normed, grads, grad_z, ctx.linears, copies)
        del normed
        grad = rms_norm_backward(grad, hidden, weight, eps, residual_grad, one_plus)
        return grad, None, None, None, None, None, *adapters


def rms_norm_lora_linears(
    hidden: Tensor,
    weight: Tensor,
    eps: float,
    linears: Sequence[LoraLinear],
    copies: AdapterCopies | None = None,
    one_plus: bool = False,
) -> tuple[Tensor, ...]:
    """The outputs of layers whose common input is the RMS norm of hidden (tokens, size); and hidden itself.

    The hidden that is returned is for the residual connection: its gradient then joins that of the norm without a pass
    over memory of its own. Saves hidden. copies: of the adapters as they are now, kept until backward; None makes them
    in each pass. one_plus: as rms_norm.
    """
    adapters = adapters_of(linears)
    outputs: tuple[Tensor, ...] = _RmsNormLoraLinears.apply(hidden, weight, eps, linears, copies, one_plus, *adapters)
    return outputs


class _LoraLinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        linear: LoraLinear,
        copies: AdapterCopies | None,
        *_: Tensor | None,
    ) -> Tensor:
        ctx.linear, ctx.copies = linear, copies
        ctx.save_for_backward(x)
        return lora_forward(x, [linear], copies, residual)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        copies = ctx.copies or copy_adapters([ctx.linear], x.dtype)
        grad_x, grad_z = backward_to_input([grad], [ctx.linear], copies)
        adapters = backward_to_adapters(x, [grad], grad_z, [ctx.linear], copies)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, *adapters


def lora_linear_add(
    x: Tensor, linear: LoraLinear, residual: Tensor | None, copies: AdapterCopies | None = None
) -> Tensor:
    """residual (tokens, out), where there is one, plus the layer's output for x (tokens, in). Saves x.
    copies: as rms_norm_lora_linears.
    """
    output: Tensor = _LoraLinearAdd.apply(x, residual, linear, copies, *adapters_of([linear]))
    return output


class _KeepGateUp(torch.autograd.Function):
    """Saves gate and up, and computes the backward pass of the down projection. Its output takes no memory."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        linear: LoraLinear,
        copies: AdapterCopies | None,
        gelu: bool,
        *_: Tensor | None,
    ) -> Tensor:
        ctx.linear, ctx.copies, ctx.gelu = linear, copies, gelu
        ctx.save_for_backward(gate, up)
        return gate.new_empty(()).expand(len(gate), linear.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        copies = ctx.copies or copy_adapters([ctx.linear], gate.dtype)
        grad_up, grad_z = backward_to_input([grad], [ctx.linear], copies)
        product, grad_gate = swiglu_backward_(grad_up, gate, up, ctx.gelu)
        adapters = backward_to_adapters(product, [grad], grad_z, [ctx.linear], copies)
        return grad_gate, grad_up, None, None, None, *adapters


class _DownAdd(torch.autograd.Function):
    """Computes the forward pass of the down projection. Saves nothing, and hands its gradient on to _KeepGateUp."""

    @staticmethod
    def forward(
        ctx: Any,
        placeholder: Tensor,
        residual: Tensor | None,
        gate: Tensor,
        up: Tensor,
        linear: LoraLinear,
        copies: AdapterCopies | None,
        gelu: bool,
    ) -> Tensor:
        return lora_forward(swiglu(gate, up, gelu), [linear], copies, residual)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, grad if ctx.needs_input_grad[1] else None, None, None, None, None, None


def swiglu_lora_linear_add(
    gate: Tensor,
    up: Tensor,
    linear: LoraLinear,
    residual: Tensor | None,
    copies: AdapterCopies | None = None,
    gelu: bool = False,
) -> Tensor:
    """residual (tokens, out), where there is one, plus the layer's output for silu(gate) * up, both (tokens, in).
    Saves gate and up. copies: as rms_norm_lora_linears. gelu: as swiglu.

    It saves them before it computes. PyTorch's non-reentrant checkpoint stops a recompute as soon as everything that
    was saved is there again. So a layer that recomputes does not run this matmul, whose result nobody reads, again.
    """
    placeholder = _KeepGateUp.apply(gate, up, linear, copies, gelu, *adapters_of([linear]))
    output: Tensor = _DownAdd.apply(placeholder, residual, gate.detach(), up.detach(), linear, copies, gelu)
    return output
