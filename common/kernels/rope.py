"""Rotary position embedding (arXiv:2104.09864) of queries and keys in one pass, in transformers' layout: the first
half of a head is rotated with its second half. Saves nothing but the cosines and sines that all layers share."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from common.kernels import HAS_TRITON, constexpr, jit, next_power_of_2, tl


@custom_op("common::rope", mutates_args=())
def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """query (tokens, heads * dim) and key (tokens, fewer heads * dim) rotated, in fp32, rounded once; contiguous.

    cos, sin: (tokens, dim), both halves of a row alike. inverse: by the opposite angle, which is the gradient.
    Differentiable in query and key.
    """
    return _rotate(query, cos, sin, inverse), _rotate(key, cos, sin, inverse)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    dim = cos.shape[-1]
    first, second = x.float().view(len(x), -1, 2, dim // 2).unbind(2)
    cosine, sine = (part[:, None, : dim // 2].float() for part in (cos, sin))
    if inverse:
        sine = -sine
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).flatten(1).to(x.dtype)


@rope.register_fake
def _(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: Any) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, ...]:
    return *rope(query.contiguous(), key.contiguous(), *ctx.saved_tensors, not ctx.inverse), None, None, None


register_autograd("common::rope", _backward, setup_context=_save)


@jit
def _kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,
    key_out_ptr,
    query_heads,
    key_heads,
    half,
    QUERY_BLOCK: constexpr,
    KEY_BLOCK: constexpr,
    HALF_BLOCK: constexpr,
    INVERSE: constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HALF_BLOCK)
    cos = tl.load(cos_ptr + token * 2 * half + columns, columns < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * 2 * half + columns, columns < half, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    for of_key in tl.static_range(2):
        source = key_ptr if of_key else query_ptr
        target = key_out_ptr if of_key else query_out_ptr
        heads = key_heads if of_key else query_heads
        rows = tl.arange(0, KEY_BLOCK if of_key else QUERY_BLOCK)
        inside = (rows[:, None] < heads) & (columns[None, :] < half)
        offsets = token * heads * 2 * half + rows[:, None] * 2 * half + columns[None, :]
        first = tl.load(source + offsets, inside, other=0.0).to(tl.float32)
        second = tl.load(source + offsets + half, inside, other=0.0).to(tl.float32)
        dtype = target.dtype.element_ty
        tl.store(target + offsets, (first * cos - second * sin).to(dtype), inside)
        tl.store(target + offsets + half, (second * cos + first * sin).to(dtype), inside)


def rope_triton(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    query, key, cos, sin = (tensor.contiguous() for tensor in (query, key, cos, sin))
    outputs = torch.empty_like(query), torch.empty_like(key)
    tokens, dim = cos.shape
    heads = [x.shape[-1] // dim for x in (query, key)]
    blocks = {"QUERY_BLOCK": next_power_of_2(heads[0]), "KEY_BLOCK": next_power_of_2(heads[1])}
    blocks["HALF_BLOCK"] = next_power_of_2(dim // 2)
    _kernel[(tokens,)](query, key, cos, sin, *outputs, *heads, dim // 2, **blocks, INVERSE=inverse)
    return outputs


if HAS_TRITON:
    rope.register_kernel("cuda")(rope_triton)
