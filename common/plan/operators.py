"""What the count knows about single operators: hidden memory, hidden steps, FLOP, and whether they touch memory."""

from collections.abc import Callable
from typing import Any

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch
import torch.nn.attention.varlen  # registers torch.ops.torch_attn
from torch import Tensor
from torch.utils.flop_counter import flop_registry

import common.machine.host_memory  # noqa: F401  (registers torch.ops.common.empty_on_host)
from common.kernels.cross_entropy import cross_entropy_
from common.kernels.rms_norm import rms_norm_backward_onto_
from common.kernels.rope import rotate_onto_
from common.kernels.swiglu import swiglu_backward_, swiglu_backward_onto_, swiglu_onto_

SDPA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
EMPTY_ON_HOST, COPY = torch.ops.common.empty_on_host.default, torch.ops.aten.copy_.default


def _varlen_backward_scratch(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, starts: Tensor, *_: Any
) -> int:
    """Bytes that the backward pass of flash attention allocates inside the operator.

    In fp32: dq, in heads of a multiple of 32 (beyond 128 of 64), and one number a token and head, each example
    lengthened by 128 tokens. With grouped heads also dk and dv of every query head. Source: torch,
    flash_attn/flash_api.cpp, mha_varlen_bwd. A deterministic one would take dq several times: it runs where
    use_deterministic_algorithms refuses others, and a run's only warns (transformers/cuda/attention_backward.cu).
    """
    tokens, heads, dim = query.shape
    multiple = 32 if dim <= 128 else 64
    expanded = 2 * query.element_size() * tokens * heads * dim if key.shape[1] != heads else 0
    return 4 * (tokens + 128 * (len(starts) - 1)) * heads * (-(-dim // multiple) * multiple + 1) + expanded


def _varlen_flops(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _: Any, longest: int, *__: Any) -> int:
    """FLOP of causal attention over examples of `longest` tokens: half of 2 matmuls * 2 * tokens * longest * width."""
    tokens, heads, dim = query.shape
    return 2 * tokens * longest * heads * dim


def _varlen_backward_flops(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    ends: Tensor,
    longest: int,
    *_: Any,
) -> int:
    """FLOP of attention's backward pass: five matmuls instead of the two of the forward pass."""
    return 5 * _varlen_flops(query, key, value, starts, ends, longest) // 2


def _sdpa_backward_scratch(grad_out: Tensor, query: Tensor, *_: Any, **__: Any) -> int:
    """Bytes that the backward pass of SDPA's memory-efficient attention allocates inside the operator.

    In fp32: dq, and one number a token and head. For head dims beyond 64 it may also hold 64 rows of dk and dv, 200
    times at most. Source: torch, transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h.
    Nothing where the inputs are fp32: then it is a CPU whose step is counted, and its operator needs none of that.
    """
    if query.element_size() > 2:
        return 0
    rows, heads, tokens, dim = query.shape
    return 4 * rows * heads * -(-tokens // 64) * 64 * (dim + 1) + (2 * 4 * 200 * 64 * dim if dim > 64 else 0)


def _sdpa_flops(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """FLOP of attention with a mask, which computes what the mask hides too: two matmuls of length x length x dim."""
    return 4 * query.numel() * key.shape[-2]


def _sdpa_backward_flops(grad_out: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """FLOP of its backward pass: five matmuls."""
    return 5 * _sdpa_flops(query, key) // 2


def _gemm_4bit(
    inputs: Tensor,
    weight: Tensor,
    shape: Any,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """Dequantizes the weight and multiplies: what the operator does from 1,536 tokens on.

    Source: bitsandbytes/backends/cuda/ops.py.
    """
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        assert absmax_offset is not None
        absmax = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    dequantized = ops.dequantize_4bit(weight, absmax, blocksize, quant_type, shape, inputs.dtype)
    return torch.nn.functional.linear(inputs, dequantized, bias)


# Bytes that an operator allocates and frees inside itself, where the count cannot see them. From its arguments. On fake
# tensors the CPU's operator of SDPA stands for the GPU's memory-efficient one, which runs where there is a mask: both
# return the output and a log-sum-exp, and both save the mask.
SCRATCH_BYTES: dict[Any, Callable[..., int]] = {
    torch.ops.torch_attn._varlen_attn_backward.default: _varlen_backward_scratch,
    SDPA_BACKWARD: _sdpa_backward_scratch,
}
# Operators that allocate inside, each with a function that does the same in operators that the count sees.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit}
# FLOP of operators that torch.utils.flop_counter does not know.
FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.linear.default: lambda inputs, weight, *_: 2 * inputs.numel() * len(weight),
    torch.ops.aten.addmm_.default: lambda _, a, b: 2 * a.numel() * b.shape[-1],
    torch.ops.torch_attn._varlen_attn.default: _varlen_flops,
    torch.ops.torch_attn._varlen_attn_backward.default: _varlen_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _sdpa_flops,
    SDPA_BACKWARD: _sdpa_backward_flops,
}
# Bytes that an operator reads and writes beyond its arguments and results, once each. Those of common.kernels write to
# arguments, and the loss reads its logits twice.
MORE_TRAFFIC: dict[Any, Callable[..., int]] = {
    cross_entropy_: lambda logits, _, scale: 2 * logits.nbytes if scale else 0,
    swiglu_backward_: lambda grad, *_: grad.nbytes,
    swiglu_onto_: lambda gate, _: gate.nbytes,
    swiglu_backward_onto_: lambda grad, *_: 3 * grad.nbytes,
    rms_norm_backward_onto_: lambda grad, *_: grad.nbytes,
    rotate_onto_: lambda query, key, *_: query.nbytes + key.nbytes,
    # Their output is among the arguments too, and they only write it.
    torch.ops.aten.mm.out: lambda *_, out: -out.nbytes,
    torch.ops.aten.addmm.out: lambda *_, out: -out.nbytes,
}
# Operators that read and write no memory. Views do not either, and say so themselves (`is_view`).
OPERATORS_WITHOUT_TRAFFIC = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.detach.default,
}


def flops_of(operator: Any, args: Any, kwargs: Any, outputs: Any) -> float:
    """FLOP of the operator's matmuls; 0 for an operator without any."""
    if operator in FLOPS:
        return FLOPS[operator](*args, **kwargs)
    if operator._overloadpacket in flop_registry:
        return flop_registry[operator._overloadpacket](*args, **kwargs, out_val=outputs)
    return 0.0
