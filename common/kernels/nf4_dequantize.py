"""Dequantization of NF4 weights with double quantization (arXiv:2305.14314 section 3), scales and weight in one pass.

    scale = outer_code[byte] * outer_scale + offset
    w = code[half a byte] * scale

in fp32, rounded once to the dtype that is asked for: bit for bit what bitsandbytes' three operators give.
"""

from collections.abc import Sequence
from typing import Any

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch
from torch import Tensor

from common.kernels import constexpr, jit, register, tl, triton

# bitsandbytes' defaults, and the paper's block sizes; the kernel knows these alone.
VALUES_PER_SCALE, SCALES_PER_OUTER_SCALE = 64, 256
NF4_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES_A_PROGRAM = 64  # which it reads, with 2,048 bytes of weights


def is_supported(state: Any, dtype: torch.dtype) -> bool:
    """Whether a weight with this quant_state of bitsandbytes, dequantized to dtype, is one for the operator."""
    return bool(
        state.quant_type == "nf4"
        and state.blocksize == VALUES_PER_SCALE
        and state.nested
        and state.state2.blocksize == SCALES_PER_OUTER_SCALE
        and dtype in NF4_DTYPES
    )


def _dequantize(
    packed: Tensor,
    scales: Tensor,
    code: Tensor,
    outer_scales: Tensor,
    outer_code: Tensor,
    offset: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    ops = torch.ops.bitsandbytes
    scales = ops.dequantize_blockwise(scales, outer_scales, outer_code, SCALES_PER_OUTER_SCALE, torch.float32)
    weight: Tensor = ops.dequantize_4bit(packed, scales.add_(offset), VALUES_PER_SCALE, "nf4", shape, dtype)
    return weight


@jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed_ptr, scales_ptr, code_ptr, outer_scales_ptr, outer_code_ptr, offset_ptr, out_ptr, size, SCALES: constexpr
):
    scale_index = tl.program_id(0).to(tl.int64) * SCALES + tl.arange(0, SCALES)
    inside = scale_index * 64 < size
    quantized = tl.load(scales_ptr + scale_index, inside, other=0)
    outer_scale = tl.load(outer_scales_ptr + scale_index // 256, inside, other=0.0)
    scale = tl.load(outer_code_ptr + quantized.to(tl.int32)) * outer_scale + tl.load(offset_ptr)
    byte_index = scale_index[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(packed_ptr + byte_index, 2 * byte_index < size, other=0).to(tl.int32)
    first = tl.load(code_ptr + (pair >> 4)) * scale[:, None]
    second = tl.load(code_ptr + (pair & 15)) * scale[:, None]
    values = tl.reshape(tl.join(first, second), (SCALES, 64))
    value_index = scale_index[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + value_index, values.to(out_ptr.dtype.element_ty), value_index < size)


def nf4_dequantize_triton(
    packed: Tensor,
    scales: Tensor,
    code: Tensor,
    outer_scales: Tensor,
    outer_code: Tensor,
    offset: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    size = out.numel()
    packed, scales = packed.contiguous(), scales.contiguous()
    tensors = packed, scales, code, outer_scales, outer_code, offset, out
    # Without fusion to one rounding: bitsandbytes rounds the product of the scale before it adds the offset.
    _dequantize_kernel[(triton.cdiv(size, 64 * SCALES_A_PROGRAM),)](
        *tensors, size, SCALES=SCALES_A_PROGRAM, enable_fp_fusion=False
    )
    return out


# Returns the weight, contiguous in `shape` and `dtype` (of NF4_DTYPES). packed: uint8, two values a byte, the first one
# in the upper half. scales: uint8, one a block of 64 values. code: fp32 (16,), the values of NF4. outer_scales: fp32,
# one a block of 256 scales. outer_code: fp32 (256,), the values of the scales' bytes. offset: fp32 scalar.
nf4_dequantize = register(
    "nf4_dequantize(Tensor packed, Tensor scales, Tensor code, Tensor outer_scales, Tensor outer_code, Tensor offset, "
    "SymInt[] shape, ScalarType dtype) -> Tensor",
    _dequantize,
    lambda packed, scales, code, outer_scales, outer_code, offset, shape, dtype: packed.new_empty(shape, dtype=dtype),
    nf4_dequantize_triton,
)
