"""The attention block of a decoder layer for long rows: its backward pass goes by key/value head.

Forward is attention as ever, over packed rows in which no token sees another example, by torch's flash attention. It
saves the layer's input, queries, keys and values, attention's output and the log-sum-exp. Backward computes the
gradients of one key/value head and its query heads after the other, and writes each over what it is the gradient of:
those of queries, keys and values over these, that of the input over that of the output. So beside what is saved there
is one head's share. All else that grows with the row is computed in tiles of tokens. For less memory and more time
queries, keys and values are not saved: backward projects the input again, one head at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.attention.varlen  # registers torch.ops.torch_attn
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
from common.kernels.rms_norm import rms_norm_backward, rms_norm_backward_onto_, rms_norm_forward
from common.kernels.rope import rotate_onto_
from common.kernels.tiled_mlp import add_gradients

FLASH_FORWARD, FLASH_BACKWARD = torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward

# Later versions of torch may have other arguments; those of 2.13 are what this module passes.
HAS_GROUPED_ATTENTION = [argument.name for argument in FLASH_BACKWARD.default._schema.arguments][-2:] == [
    "scale",
    "window_size",
]


@dataclass(frozen=True)
class HeadNorms:
    """The RMS norms of each head's queries and keys (Qwen3): weights (dim,)."""

    query: Tensor
    key: Tensor
    eps: float


@dataclass(frozen=True)
class AttentionParts:
    """The tensors and sizes of an attention block and of the RMS norm before it."""

    norm: Tensor  # the norm's weight, frozen: (size,)
    eps: float
    qkv: Sequence[LoraLinear]
    out: LoraLinear
    head_norms: HeadNorms | None
    dim: int  # of a head
    starts: Tensor  # int32 (examples + 1,): where each example begins, and the end
    longest: int  # tokens in the longest example
    window: int | None = None  # tokens that each token sees, itself among them; None: all before it
    qkv_copies: AdapterCopies | None = None  # as for rms_norm_lora_linears
    out_copies: AdapterCopies | None = None
    # Called in backward once attention's own is done, when the block takes less again.
    after_attention: Callable[[], None] | None = None
    qkv_again: bool = False  # queries, keys and values are not saved: backward computes those of each head again

    @property
    def _window_size(self) -> list[int]:
        """Tokens that are seen to the left and to the right; -1 is all of them."""
        return [-1 if self.window is None or self.window >= self.longest else self.window - 1, 0]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's output (tokens, heads * dim), and its log-sum-exp in fp32, (heads, tokens)."""
        by_head = [x.unflatten(1, (-1, self.dim)) for x in (query, key, value)]
        lengths, window = (self.starts, self.starts, self.longest, self.longest), self._window_size
        output, lse, _ = FLASH_FORWARD(*by_head, *lengths, window == [-1, 0], None, window, True)
        return output.flatten(1), lse

    def attend_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
    ) -> list[Tensor]:
        """The gradients of query, key and value, each (tokens, its heads * dim).

        Query, key and value may be columns of wider tensors. torch copies a gradient and an output that are; here the
        copy is made where a plan sees it.
        """
        inputs = (grad.contiguous(), query, key, value, output.contiguous())
        by_head = [x.unflatten(1, (-1, self.dim)) for x in inputs]
        lengths, window = (self.starts, self.starts, self.longest, self.longest), self._window_size
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        grads = FLASH_BACKWARD(*by_head, lse, *lengths, window == [-1, 0], no_dropout, None, window)
        return [x.flatten(1).contiguous() for x in grads]  # which they are: their own memory

    def project(self, hidden: Tensor, linears: Sequence[LoraLinear], copies: AdapterCopies, size: int) -> list[Tensor]:
        """What the layers make of the norm of hidden (tokens, size), as many tokens at a time; linears: dequantized."""
        outputs = [hidden.new_empty(len(hidden), linear.out_features) for linear in linears]
        for tile in tiles.split(len(hidden), size):
            normed = rms_norm_forward(hidden[tile], self.norm, self.eps)
            lora_forward(normed, linears, copies, outs=[x[tile] for x in outputs])
            del normed
        return outputs

    def norm_and_rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """What attention takes: new tensors where there are norms of heads, else query and key written over."""
        if self.head_norms is not None:
            query = _rms_norm_by_head(query, self.head_norms.query, self.head_norms.eps)
            key = _rms_norm_by_head(key, self.head_norms.key, self.head_norms.eps)
        rotate_onto_(query, key, cos, sin, False)
        return query, key


def _rms_norm_by_head(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_forward(x.reshape(-1, len(weight)), weight, eps).view(x.shape)


def _rms_norm_by_head_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_backward(grad.view(-1, len(weight)), x.reshape(-1, len(weight)), weight, eps).view(grad.shape)


class _AddAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, cos: Tensor, sin: Tensor, block: AttentionParts, size: int, *_: Tensor | None
    ) -> Tensor:
        ctx.block, ctx.size = block, size
        tokens = len(hidden)
        linears, (out,) = dequantize_all(block.qkv, hidden.dtype), dequantize_all([block.out], hidden.dtype)
        copies = block.qkv_copies or copy_adapters(linears, hidden.dtype)
        out_copies = block.out_copies or copy_adapters([out], hidden.dtype)
        qkv = block.project(hidden, linears, copies, size)
        del linears
        output, lse = block.attend(*block.norm_and_rotate(qkv[0], qkv[1], cos, sin), qkv[2])
        if block.qkv_again:
            qkv.clear()
        added = torch.empty_like(hidden)
        for tile in tiles.split(tokens, size):
            lora_forward(output[tile], [out], out_copies, hidden[tile], [added[tile]])
        # Where there are norms of heads, queries and keys are saved as they were before.
        ctx.save_for_backward(hidden, cos, sin, output, lse, *qkv)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, cos, sin, output, lse, *qkv = ctx.saved_tensors
        block: AttentionParts = ctx.block
        grad = grad.contiguous()
        grads, of_out = _backward_by_head(block, ctx.size, grad, hidden, cos, sin, output, lse, qkv)
        del output, lse, qkv
        if block.after_attention is not None:
            block.after_attention()
        of_qkv = _backward_to_hidden(block, ctx.size, grad, hidden, grads)
        return grad, None, None, None, None, *of_qkv, *of_out


def _backward_by_head(
    block: AttentionParts,
    size: int,
    grad: Tensor,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    output: Tensor,
    lse: Tensor,
    qkv: Sequence[Tensor],
) -> tuple[Sequence[Tensor], list[Tensor | None]]:
    """Returns the gradients of query, key and value, and those of the adapter of the output's layer.

    qkv: query, key and value; the gradients are written over them. Empty where they are computed again: then those of
    the queries are written over attention's output, of which nobody needs a head that is done.
    """
    dtype, dim, norms = grad.dtype, block.dim, block.head_norms
    linears, qkv_copies = [], None
    if block.qkv_again:
        linears = dequantize_all(block.qkv, dtype)
        qkv_copies = block.qkv_copies or copy_adapters(linears, dtype)
        qkv = [output, *(hidden.new_empty(len(hidden), linear.out_features) for linear in linears[1:])]
    query, key, value = qkv
    (out,) = dequantize_all([block.out], dtype)
    copies = block.out_copies or copy_adapters([out], dtype)
    (b,) = copies.b
    grad_z = None if b is None else grad @ b
    adapters = backward_to_adapters(output, [grad], grad_z, [out], copies)
    share = query.shape[1] // key.shape[1]  # query heads of a key/value head
    for part in tiles.split(key.shape[1] // dim, 1):  # of the heads: they are alike, and a plan computes a few
        head = part.start
        heads, columns = slice(head * share, (head + 1) * share), slice(head * share * dim, (head + 1) * share * dim)
        own = slice(head * dim, (head + 1) * dim)
        inner = places = [query[:, columns], key[:, own], value[:, own]]
        if qkv_copies is not None:
            inner = block.project(hidden, *_outputs_of(linears, qkv_copies, (columns, own, own)), size)
        rotated = inner[0], inner[1]
        if norms is not None or block.qkv_again:  # else they were rotated before they were saved
            rotated = block.norm_and_rotate(*rotated, cos, sin)
        grad_output = grad @ out.weight[:, columns]
        if grad_z is not None and copies.a is not None:
            grad_output.addmm_(grad_z, copies.a[:, columns])
        grads = block.attend_backward(grad_output, *rotated, inner[2], output[:, columns], lse[heads])
        del grad_output, rotated
        rotate_onto_(grads[0], grads[1], cos, sin, True)
        if norms is not None:
            for index, weight in enumerate((norms.query, norms.key)):
                grads[index] = _rms_norm_by_head_backward(grads[index], inner[index], weight, norms.eps)
        for place, of_x in zip(places, grads, strict=True):
            place.copy_(of_x)
        del grads, of_x, inner  # before those of the next head are there
    return qkv, adapters


def _outputs_of(
    linears: Sequence[LoraLinear], copies: AdapterCopies, rows: Sequence[slice]
) -> tuple[list[LoraLinear], AdapterCopies]:
    """The layers, whose weights are dequantized, with some of their outputs alone."""
    few = [
        replace(linear, weight=linear.weight[part], bias=None if linear.bias is None else linear.bias[part])
        for linear, part in zip(linears, rows, strict=True)
    ]
    return few, replace(copies, b=[None if b is None else b[part] for b, part in zip(copies.b, rows, strict=True)])


def _backward_to_hidden(
    block: AttentionParts, size: int, grad: Tensor, hidden: Tensor, grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Writes the gradient of `hidden` over `grad`, that of the block's output. grads: of query, key and value.

    Returns the gradients of the adapters of their three layers.
    """
    linears = dequantize_all(block.qkv, hidden.dtype)
    copies = block.qkv_copies or copy_adapters(linears, hidden.dtype)
    adapters: list[Tensor | None] = []
    for tile in tiles.split(len(hidden), size):
        of_qkv = [x[tile] for x in grads]
        grad_normed, grad_z = backward_to_input(of_qkv, linears, copies)
        normed = rms_norm_forward(hidden[tile], block.norm, block.eps)
        adapters = add_gradients(adapters, backward_to_adapters(normed, of_qkv, grad_z, linears, copies))
        del normed, grad_z
        rms_norm_backward_onto_(grad_normed, hidden[tile], block.norm, block.eps, grad[tile])
        del grad_normed
    return adapters


def add_attention_by_head(hidden: Tensor, cos: Tensor, sin: Tensor, block: AttentionParts, tile: int) -> Tensor:
    """hidden (tokens, size) plus the attention of its RMS norm; all tokens are those of one packed micro-batch.

    cos, sin: (tokens, dim), both halves of a row alike. tile: tokens that the linear layers compute at a time. Saves
    hidden, queries, keys, values (not with qkv_again), attention's output and its log-sum-exp. Its backward pass writes
    over these and over the gradient of its output: nobody else may need them, and it runs once.
    """
    adapters = adapters_of([*block.qkv, block.out])
    added: Tensor = _AddAttention.apply(hidden, cos, sin, block, tile, *adapters)
    return added
