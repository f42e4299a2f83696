"""The MLP of a decoder layer in tiles of tokens: what it takes beside its input and output does not grow with the row.

It saves its input alone. Backward computes the norm, gate and up again, tile by tile, and writes the gradient of the
input over that of the output: the tokens of a tile depend on no others. The frozen matmuls are as many as without
tiles, because a layer that recomputes stops before this one (see _KeepInput). Each weight is dequantized once a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.kernels import tiles
from common.kernels.lora_linear import (
    AdapterCopies,
    LoraLinear,
    adapters_of,
    backward_to_adapters,
    backward_to_input,
    copy_adapters,
    dequantize_all,
    lora_forward,
)
from common.kernels.rms_norm import rms_norm_backward_onto_, rms_norm_forward
from common.kernels.swiglu import swiglu_backward_onto_, swiglu_onto_


@dataclass(frozen=True)
class MlpParts:
    """The tensors of an MLP and of the RMS norm before it."""

    norm: Tensor  # the norm's weight, frozen: (size,)
    eps: float
    gate_up: Sequence[LoraLinear]
    down: LoraLinear
    gate_up_copies: AdapterCopies | None = None  # as for rms_norm_lora_linears
    down_copies: AdapterCopies | None = None


def add_gradients(total: list[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums of gradients of the same adapters from several tiles; an empty total is none yet."""
    if not total:
        return list(more)
    for one, other in zip(total, more, strict=True):
        if one is not None and other is not None:
            one.add_(other)
    return total


class _KeepInput(torch.autograd.Function):
    """Saves the MLP's input, and computes the whole backward pass. Its output has a shape and takes no memory.

    It comes before the forward pass, so PyTorch's checkpoint stops a recompute here: nobody would read its result.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mlp: MlpParts, tile: int, *_: Tensor | None) -> Tensor:
        ctx.mlp, ctx.tile = mlp, tile
        ctx.save_for_backward(hidden)
        return hidden.new_empty(()).expand(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        mlp, dtype = ctx.mlp, hidden.dtype
        grad = grad.contiguous()
        gate_up, (down,) = dequantize_all(mlp.gate_up, dtype), dequantize_all([mlp.down], dtype)
        gate_up_copies = mlp.gate_up_copies or copy_adapters(gate_up, dtype)
        down_copies = mlp.down_copies or copy_adapters([down], dtype)
        of_gate_up: list[Tensor | None] = []
        of_down: list[Tensor | None] = []
        for tile in tiles.split(len(hidden), ctx.tile):
            x, grad_y = hidden[tile], grad[tile]
            normed = rms_norm_forward(x, mlp.norm, mlp.eps)
            gate, up = lora_forward(normed, gate_up, gate_up_copies)
            grad_up, grad_z = backward_to_input([grad_y], [down], down_copies)
            swiglu_backward_onto_(grad_up, gate, up)
            product, grads = up, [gate, grad_up]
            del gate, up, grad_up
            of_down = add_gradients(of_down, backward_to_adapters(product, [grad_y], grad_z, [down], down_copies))
            del product
            grad_normed, grad_z = backward_to_input(grads, gate_up, gate_up_copies)
            more = backward_to_adapters(normed, grads, grad_z, gate_up, gate_up_copies)
            of_gate_up = add_gradients(of_gate_up, more)
            del grads, normed, grad_z, more
            rms_norm_backward_onto_(grad_normed, x, mlp.norm, mlp.eps, grad_y)
            del grad_normed  # before those of the next tile are there
        return grad, None, None, *of_gate_up, *of_down


class _AddTiledMlp(torch.autograd.Function):
    """Computes the forward pass. Saves nothing, and hands its gradient on to _KeepInput."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, hidden: Tensor, mlp: MlpParts, size: int) -> Tensor:
        gate_up, (down,) = dequantize_all(mlp.gate_up, hidden.dtype), dequantize_all([mlp.down], hidden.dtype)
        gate_up_copies = mlp.gate_up_copies or copy_adapters(gate_up, hidden.dtype)
        down_copies = mlp.down_copies or copy_adapters([down], hidden.dtype)
        output = torch.empty_like(hidden)
        for tile in tiles.split(len(hidden), size):
            gate, up = lora_forward(rms_norm_forward(hidden[tile], mlp.norm, mlp.eps), gate_up, gate_up_copies)
            swiglu_onto_(gate, up)
            del up
            lora_forward(gate, [down], down_copies, hidden[tile], [output[tile]])
            del gate
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


def add_tiled_mlp(hidden: Tensor, mlp: MlpParts, tile: int) -> Tensor:
    """hidden (tokens, size) plus the MLP of its RMS norm, `tile` tokens at a time. Saves hidden.

    Its backward pass writes over the gradient of its output: nobody else may need that.
    """
    placeholder = _KeepInput.apply(hidden, mlp, tile, *adapters_of([*mlp.gate_up, mlp.down]))
    output: Tensor = _AddTiledMlp.apply(placeholder, hidden.detach(), mlp, tile)
    return output
