"""What is not Python in the published stacks, rebuilt for fake tensors: the same allocations, the same FLOP.

Also what differs between a CPU, where the fake tensors are, and a GPU: autocast, and the masks of dropout.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from common.plan.operators import SCRATCH_BYTES

# torch's cuBLAS workspace before Hopper, ":4096:2:16:8" (ATen/cuda/CublasHandlePool.cpp), once for the thread of the
# forward pass and once for that of the backward pass.
WORKSPACE_BYTES = 2 * (2 * 4096 + 8 * 16) * 1024


@dataclass
class Scales:
    """What bitsandbytes keeps beside a packed weight (functional.py, QuantState)."""

    shape: torch.Size
    dtype: torch.dtype  # of the weight that was quantised, and so of what it is dequantised to
    absmax: Tensor
    code: Tensor  # of NF4; each weight has its own
    nested: tuple[Tensor, Tensor, Tensor] | None = None  # double quantisation: scales of the scales, code, offset

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype, nested_code: Tensor | None) -> "Scales":
        """nested_code: the code of the scales, which all weights share; None without double quantisation."""
        shape = torch.Size((linear.out_features, linear.in_features))
        blocks = -(-shape.numel() // 64)
        if nested_code is None:
            return cls(shape, dtype, torch.empty(blocks), torch.empty(16))
        nested = torch.empty(-(-blocks // 256)), nested_code, torch.empty(())
        return cls(shape, dtype, torch.empty(blocks, dtype=torch.uint8), torch.empty(16), nested)

    def tensors(self) -> list[Tensor]:
        return [self.absmax, self.code, *(self.nested or ())]

    def dequantize(self, packed: Tensor) -> Tensor:
        """The weight in its dtype. functional.dequantize_4bit of bitsandbytes 0.41 to 0.45."""
        absmax = self.absmax
        if self.nested:
            scales, code, offset = self.nested
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, scales, code, 256, torch.float32)
            absmax += offset
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", self.shape, self.dtype)
        return weight


class MatMul4Bit(torch.autograd.Function):
    """bitsandbytes' matmul of that time: dequantise, multiply, keep the packed weight (autograd/_functions.py)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, scales: Scales, keeps_input: bool) -> Tensor:
        ctx.packed, ctx.scales = packed, scales
        # Before 0.43.2 an attribute held it, where activation checkpointing does not see it.
        ctx.inputs = inputs if keeps_input and inputs.requires_grad else None
        return nn.functional.linear(inputs, scales.dequantize(packed).to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.matmul(grad, ctx.scales.dequantize(ctx.packed).to(grad.dtype)), None, None, None


class OldLinear4bit(Linear4bit):
    """A Linear4bit, which PEFT knows by its class, with the forward pass of that time."""

    scales: Scales
    keeps_input = False

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = MatMul4Bit.apply(x.to(self.compute_dtype), self.weight, self.scales, self.keeps_input)
        return output.to(x.dtype)


@custom_op("published::flash_attention", mutates_args=())
def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-2, causal. query: (rows, tokens, heads, width). Returns output, log-sum-exp, random state."""
    raise NotImplementedError("it is counted, never computed")


@flash_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens, heads, _ = query.shape
    lse = query.new_empty((rows, heads, tokens), dtype=torch.float32)
    return torch.empty_like(query), lse, query.new_empty(2, dtype=torch.int64)


@custom_op("published::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    raise NotImplementedError("it is counted, never computed")


@flash_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@register_flop_formula(torch.ops.published.flash_attention)
def _(query: Any, key: Any, value: Any, **_: Any) -> int:
    rows, tokens, heads, width = query
    return 2 * rows * heads * tokens * tokens * width  # half of two matmuls of 2 FLOP


@register_flop_formula(torch.ops.published.flash_attention_backward)
def _(grad: Any, query: Any, *_: Any, **__: Any) -> int:
    rows, tokens, heads, width = query
    return 5 * rows * heads * tokens * tokens * width  # half of five matmuls


def _backward_scratch(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    """Bytes inside the backward pass: dq and one number a token and head in fp32; dk and dv of every query head.

    Source: flash-attention 2.7, csrc/flash_attn/flash_api.cpp, mha_bwd.
    """
    rows, tokens, heads, width = query.shape
    rounded = -(-tokens // 128) * 128
    expanded = 2 * query.nbytes if key.shape[2] != heads else 0
    return 4 * rows * rounded * heads * (width + 1) + expanded


SCRATCH_BYTES[torch.ops.published.flash_attention_backward.default] = _backward_scratch


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, lse, random_state = torch.ops.published.flash_attention(query, key, value)
        ctx.save_for_backward(query, key, value, output, lse, random_state)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, output, lse, _ = ctx.saved_tensors
        return torch.ops.published.flash_attention_backward(grad.contiguous(), query, key, value, output, lse)


class MaskedAttention(torch.autograd.Function):
    """torch's memory-efficient attention with a mask (ATen/native/transformers/cuda/attention.cu).

    query: (rows, heads, tokens, width). The log-sum-exp is padded to a multiple of 32 tokens. Its FLOP are not counted.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        rows, heads, tokens, width = query.shape
        output = query.new_empty((rows, tokens, heads, width)).transpose(1, 2)
        lse = query.new_empty((rows, heads, -(-tokens // 32) * 32), dtype=torch.float32)
        seed_and_offset = (query.new_empty((), dtype=torch.int64) for _ in range(2))
        ctx.save_for_backward(query, key, value, mask, output, lse, *seed_and_offset)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, *_ = ctx.saved_tensors
        rows, heads, tokens, width = query.shape
        grads = [query.new_empty((rows, tokens, heads, width)).transpose(1, 2) for _ in range(3)]
        sums = [query.new_empty(shape, dtype=torch.float32) for shape in ((rows, heads, tokens), query.shape)]
        del sums  # they lived as long as the operator
        return *grads, None


class MaskedDropout(nn.Dropout):
    """Saves a mask of one byte an entry, as on a GPU. On a CPU torch saves its noise in the dtype of the input."""

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = torch.native_dropout(inputs, self.p, self.training)[0]
        return output


def act_as_on_gpu() -> None:
    """Lets the libraries that ask whether CUDA's autocast is on see the CPU's, for the whole process."""
    of_device = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device_type="cpu": of_device(device_type)
    torch.get_autocast_gpu_dtype = lambda: torch.bfloat16


def use_attention(kind: str, transformers: Any) -> str:
    """Lets transformers compute attention as the authors' did ("flash" or "masked"), for the whole process.

    Returns the name under which transformers knows it: versions 4.38, 4.45 and 4.48 each have another place for it.
    """
    if kind == "flash" and hasattr(transformers.modeling_utils, "ALL_ATTENTION_FUNCTIONS"):  # from 4.48 on

        def attend(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
            inputs = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return FlashAttention.apply(*(t.bfloat16() if t.dtype == torch.float32 else t for t in inputs)), None

        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = attend
        transformers.PreTrainedModel._check_and_enable_flash_attn_2 = classmethod(_enable_flash_attention)
        return "flash_attention_2"
    if kind == "flash" and hasattr(transformers, "GraniteConfig"):  # 4.45: classes of attention that call one function
        transformers.PreTrainedModel._check_and_enable_flash_attn_2 = classmethod(_enable_flash_attention)
        for name in ("llama", "mistral", "granite"):
            module: Any = import_module(f"transformers.models.{name}.modeling_{name}")
            module._flash_attention_forward = lambda query, key, value, *_, **__: FlashAttention.apply(
                query, key, value
            )
            module.is_flash_attn_greater_or_equal_2_10 = lambda: True
        return "flash_attention_2"
    functional: Any = nn.functional
    functional.scaled_dot_product_attention = _flash_sdpa if kind == "flash" else _masked_sdpa
    return "sdpa"


def _enable_flash_attention(_: Any, config: Any, *__: Any, **___: Any) -> Any:
    config._attn_implementation = "flash_attention_2"
    return config


def _flash_sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return FlashAttention.apply(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)


def _masked_sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, *_: Any, **__: Any) -> Tensor:
    inputs = [tensor.contiguous() for tensor in (query, key, value)]  # as transformers 4.38 does on CUDA
    mask = attn_mask.expand(*query.shape[:2], -1, -1)
    output: Tensor = MaskedAttention.apply(*inputs, mask)
    return output
