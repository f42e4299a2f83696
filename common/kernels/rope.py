"""Rotary position embedding (arXiv:2104.09864) of queries and keys in one pass over memory.

The layout is transformers': the first half of a head is rotated with its second half. Only the cosines and sines are
saved for backward, which all layers share.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.kernels import constexpr, jit, next_power_of_2, register, tl


def _rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return _rotate(query, cos, sin, inverse), _rotate(key, cos, sin, inverse)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    dim = cos.shape[-1]
    first, second = x.float().reshape(len(x), -1, 2, dim // 2).unbind(2)
    cosine, sine = (part[:, None, : dim // 2].float() for part in (cos, sin))
    if inverse:
        sine = -sine
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).flatten(1).to(x.dtype)


@jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
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


def rotate_triton(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    query, key = query.contiguous(), key.contiguous()
    outputs = torch.empty_like(query), torch.empty_like(key)
    _launch_rotation(query, key, cos, sin, *outputs, inverse)
    return outputs


def _launch_rotation(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, query_out: Tensor, key_out: Tensor, inverse: bool
) -> None:
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, dim = cos.shape
    heads = [x.shape[-1] // dim for x in (query, key)]
    blocks = {"QUERY_BLOCK": next_power_of_2(heads[0]), "KEY_BLOCK": next_power_of_2(heads[1])}
    blocks["HALF_BLOCK"] = next_power_of_2(dim // 2)
    _rotate_kernel[(tokens,)](query, key, cos, sin, query_out, key_out, *heads, dim // 2, **blocks, INVERSE=inverse)


def _fake_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key))


# Returns query (tokens, heads * dim) and key (tokens, fewer heads * dim) rotated: computed in fp32, rounded once,
# contiguous. cos, sin: (tokens, dim), both halves of a row alike. inverse: rotates by the opposite angle, which is what
# backward does with the gradients.
rotate = register(
    "rotate(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    _rotate_both,
    _fake_rotate,
    rotate_triton,
)


def _rotate_onto_(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    for x in (query, key):
        x.copy_(_rotate(x, cos, sin, inverse))


def rotate_onto_triton_(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    assert query.is_contiguous() and key.is_contiguous()
    _launch_rotation(query, key, cos, sin, query, key, inverse)


# The rotation as rotate, written over query and key, which are contiguous.
rotate_onto_ = register(
    "rotate_onto_(Tensor(a!) query, Tensor(b!) key, Tensor cos, Tensor sin, bool inverse) -> ()",
    _rotate_onto_,
    lambda query, key, cos, sin, inverse: None,
    rotate_onto_triton_,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        rotated: tuple[Tensor, Tensor] = rotate(query, key, cos, sin, False)
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, ...]:
        return *rotate(query, key, *ctx.saved_tensors, True), None, None


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates query (tokens, heads * dim) and key (tokens, fewer heads * dim); differentiable in both.

    cos, sin: (tokens, dim), both halves of a row alike, as transformers gives them.
    """
    rotated: tuple[Tensor, Tensor] = _Rope.apply(query, key, cos, sin)
    return rotated
