"""LoRA linear layers over frozen 4-bit weights, fused with what stands before and after them in a decoder layer.

Each computes its low-rank branch first and lets the frozen matmul add to it (cuBLAS' own accumulation, no pass over
memory), dequantises each weight once a use, and keeps nothing for backward but its input: not the norm's output, which
is computed again, not the product of gate and up, and no bottleneck of LoRA. They are autograd functions over operators
that others see (matmuls, bitsandbytes' dequantisation, those of this folder), so a plan counts what a run allocates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from common.kernels.swiglu import swiglu, swiglu_backward_


@dataclass(frozen=True)
class LoraLinear:
    """y = x W^T + bias + scale * (x A^T) B^T; without an adapter the first two terms."""

    weight: Tensor  # frozen: (out, in), or packed in 4 bit, in any dtype, with its scales in `state`
    bias: Tensor | None = None  # frozen, (out,)
    a: Tensor | None = None  # (rank, in), any float dtype; cast to that of x at use
    b: Tensor | None = None  # (out, rank)
    scale: float = 1.0
    state: Any = None  # bitsandbytes' QuantState of a packed weight; None looks at the weight's own

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight (out, in), dequantised anew."""
        state = self.state or getattr(self.weight, "quant_state", None)
        if state is None:
            return self.weight.detach().to(dtype)
        packed = self.weight.detach()
        if packed.dtype != torch.uint8:  # stored as the model's dtype, so that FSDP can shard them together
            packed = packed.view(torch.uint8)
        ops, absmax = torch.ops.bitsandbytes, state.absmax
        if state.nested:
            of = state.state2
            absmax = ops.dequantize_blockwise(absmax, of.absmax, of.code, of.blocksize, torch.float32).add_(
                state.offset
            )
        return ops.dequantize_4bit(packed, absmax, state.blocksize, state.quant_type, state.shape, dtype)

    def scaled_b(self, dtype: torch.dtype) -> Tensor:
        assert self.b is not None
        return (self.b.detach() if self.scale == 1 else self.b.detach() * self.scale).to(dtype)


def _joined(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """The parts that are there as one tensor; None where none is."""
    there = [part for part in parts if part is not None]
    return torch.cat(there, dim) if len(there) > 1 else there[0] if there else None


def _stacked_a(linears: Sequence[LoraLinear], dtype: torch.dtype) -> Tensor | None:
    """The A of all of them, (sum of ranks, in): what they share is one matmul with their common input."""
    return _joined([None if linear.a is None else linear.a.detach().to(dtype) for linear in linears], 0)


def _split(bottleneck: Tensor | None, linears: Sequence[LoraLinear], dim: int) -> list[Tensor | None]:
    """Of each layer its part of what _stacked_a leads to; None without an adapter."""
    if bottleneck is None:
        return [None for _ in linears]
    parts = iter(bottleneck.split([len(linear.a) for linear in linears if linear.a is not None], dim))
    return [None if linear.a is None else next(parts) for linear in linears]


def _lora_forward(x: Tensor, linears: Sequence[LoraLinear], onto: Tensor | None = None) -> list[Tensor]:
    """What the layers give for their common input x (tokens, in): each (tokens, out), plus `onto`."""
    a = _stacked_a(linears, x.dtype)
    outputs = []
    for linear, bottleneck in zip(linears, _split(None if a is None else x @ a.t(), linears, 1), strict=True):
        start = linear.bias if onto is None else onto if linear.bias is None else onto + linear.bias
        if bottleneck is None:
            weight = linear.dense(x.dtype)
            outputs.append(x @ weight.t() if start is None else torch.addmm(start, x, weight.t()))
            continue
        b = linear.scaled_b(x.dtype).t()
        branch = bottleneck @ b if start is None else torch.addmm(start, bottleneck, b)
        outputs.append(branch.addmm_(x, linear.dense(x.dtype).t()))
    return outputs


def _input_gradient(
    grads: Sequence[Tensor], linears: Sequence[LoraLinear], a: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the common input, and that of the bottlenecks, (tokens, sum of ranks); `a` is _stacked_a."""
    dtype = grads[0].dtype
    bottlenecks = _joined(
        [None if li.b is None else grad @ li.scaled_b(dtype) for grad, li in zip(grads, linears, strict=True)], 1
    )
    total = None if a is None or bottlenecks is None else bottlenecks @ a
    for grad, linear in zip(grads, linears, strict=True):
        weight = linear.dense(dtype)
        total = grad @ weight if total is None else total.addmm_(grad, weight)
        del weight
    assert total is not None
    return total, bottlenecks


def _adapter_gradients(
    x: Tensor, grads: Sequence[Tensor], bottleneck_grads: Tensor | None, linears: Sequence[LoraLinear], a: Tensor | None
) -> list[Tensor | None]:
    """The gradients of A and B of each layer in turn, in their own dtype; None without an adapter."""
    if a is None or bottleneck_grads is None:
        return [None] * (2 * len(linears))
    of_a = _split(bottleneck_grads.t() @ x, linears, 0)
    found: list[Tensor | None] = []
    for linear, grad, bottleneck, grad_a in zip(linears, grads, _split(x @ a.t(), linears, 1), of_a, strict=True):
        if linear.a is None or linear.b is None or bottleneck is None or grad_a is None:
            found += [None, None]
            continue
        grad_b = (grad.t() @ bottleneck).to(linear.b.dtype)
        found += [grad_a.to(linear.a.dtype), grad_b if linear.scale == 1 else grad_b * linear.scale]
    return found


def _adapters(linears: Sequence[LoraLinear]) -> list[Tensor | None]:
    return [adapter for linear in linears for adapter in (linear.a, linear.b)]


class _RmsNormLoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, eps: float, linears: Sequence[LoraLinear], *_: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.weight, ctx.eps, ctx.linears = weight, eps, linears
        ctx.save_for_backward(hidden)
        return *_lora_forward(rms_norm_forward(hidden, weight, eps), linears), hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        *grads, residual = grads  # type: ignore[assignment]
        a = _stacked_a(ctx.linears, hidden.dtype)
        grad, bottlenecks = _input_gradient(grads, ctx.linears, a)
        normed = rms_norm_forward(hidden, ctx.weight, ctx.eps)
        adapters = _adapter_gradients(normed, grads, bottlenecks, ctx.linears, a)
        del normed
        return rms_norm_backward(grad, hidden, ctx.weight, ctx.eps, residual), None, None, None, *adapters


def rms_norm_lora_linears(
    hidden: Tensor, weight: Tensor, eps: float, linears: Sequence[LoraLinear]
) -> tuple[Tensor, ...]:
    """Each layer's output for the RMS norm of hidden (tokens, size), and hidden itself, for the residual: its gradient
    then joins that of the norm without a pass of its own. Saves hidden."""
    outputs: tuple[Tensor, ...] = _RmsNormLoraLinears.apply(hidden, weight, eps, linears, *_adapters(linears))
    return outputs


class _LoraLinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, linear: LoraLinear, *_: Tensor | None) -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(x)
        return _lora_forward(x, [linear], residual)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        a = _stacked_a([ctx.linear], x.dtype)
        grad_x, bottlenecks = _input_gradient([grad], [ctx.linear], a)
        return grad_x, grad, None, *_adapter_gradients(x, [grad], bottlenecks, [ctx.linear], a)


def lora_linear_add(x: Tensor, linear: LoraLinear, residual: Tensor) -> Tensor:
    """residual (tokens, out) plus the layer's output for x (tokens, in). Saves x."""
    output: Tensor = _LoraLinearAdd.apply(x, residual, linear, *_adapters([linear]))
    return output


class _KeepGateUp(torch.autograd.Function):
    """Saves gate and up, and stands for the down projection in backward; its output has a shape and no memory."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, linear: LoraLinear, shape: torch.Size, *_: Tensor | None) -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(gate, up)
        return gate.new_empty(()).expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        a = _stacked_a([ctx.linear], gate.dtype)
        grad_up, bottlenecks = _input_gradient([grad], [ctx.linear], a)
        product, grad_gate = swiglu_backward_(grad_up, gate, up)
        adapters = _adapter_gradients(product, [grad], bottlenecks, [ctx.linear], a)
        return grad_gate, grad_up, None, None, *adapters


class _DownAdd(torch.autograd.Function):
    """The forward pass alone: saves nothing, and hands its gradient on to _KeepGateUp."""

    @staticmethod
    def forward(
        ctx: Any, placeholder: Tensor, residual: Tensor, gate: Tensor, up: Tensor, linear: LoraLinear
    ) -> Tensor:
        return _lora_forward(swiglu(gate, up), [linear], residual)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, grad, None, None, None


def swiglu_lora_linear_add(gate: Tensor, up: Tensor, linear: LoraLinear, residual: Tensor) -> Tensor:
    """residual (tokens, out) plus the layer's output for silu(gate) * up, both (tokens, in). Saves gate and up.

    It saves them first and computes then: PyTorch's non-reentrant checkpoint stops a recompute when everything is
    there that was saved, so a layer that recomputes never runs this matmul a second time, whose result nobody reads.
    """
    placeholder = _KeepGateUp.apply(gate, up, linear, residual.shape, *_adapters([linear]))
    output: Tensor = _DownAdd.apply(placeholder, residual, gate.detach(), up.detach(), linear)
    return output
