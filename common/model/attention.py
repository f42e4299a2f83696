"""Attention over packed rows that lets no token see another example, registered with transformers as "packed".

The rows of a micro-batch lie behind one another, (1, tokens), and flash attention is told where each example begins:
no mask, no padding, and memory that grows with the tokens, not with their square. It comes with torch (2.10 or newer,
NVIDIA GPUs from the RTX 30 series on). Elsewhere transformers' SDPA with a block-diagonal mask gives the same result.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from common.machine.device import Machine

PACKED_ATTENTION = "packed"
FLASH_CAPABILITY = (8, 0)  # compute capability that torch's flash attention needs (ATen/native/transformers/cuda)
_ARGUMENTS = inspect.signature(varlen_attn).parameters
# torch 2.10 has is_causal and lets key and value have fewer heads; later versions ask for both in other words.
_CAUSAL: dict[str, Any] = {"is_causal": True} if "is_causal" in _ARGUMENTS else {"window_size": (-1, 0)}
if "enable_gqa" in _ARGUMENTS:
    _CAUSAL["enable_gqa"] = True
# What "keep attention" keeps: the operators whose outputs are attention's output and log-sum-exp.
ATTENTION_OPERATORS = (
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def attention_implementation(machine: Machine) -> str:
    """What transformers shall use on this machine: "packed", or "sdpa" where torch has no flash attention."""
    if machine.is_gpu and torch.cuda.get_device_capability(machine.device) >= FLASH_CAPABILITY:
        return PACKED_ATTENTION
    return "sdpa"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example, in transformers' form.

    query: bf16 or fp16 (1, heads, tokens, dim); key and value: the same with the model's fewer heads. cu_seq_lens_q:
    int32 (examples + 1,), where each begins, and the end; max_length_q: tokens in the longest. sliding_window: tokens
    that each one sees, itself among them. Returns (1, tokens, heads, dim). transformers makes no mask for an attention
    that it does not know, so generating from prompts of several lengths needs "sdpa". Raises ValueError without the
    lengths, and for a window that this torch cannot do.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("packed attention needs cu_seq_lens_q and max_length_q, see common.data.batches.collate")
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        raise ValueError(f"packed attention scales by dim ** -0.5, the model asks for {scaling}")
    causal = _CAUSAL
    if sliding_window is not None and sliding_window < max_length_q:
        if "window_size" not in _ARGUMENTS:
            raise ValueError(f"torch {torch.__version__} has no packed attention with a window of {sliding_window}")
        causal = _CAUSAL | {"window_size": (sliding_window - 1, 0)}
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    output = varlen_attn(q, k, v, *lengths, **causal)
    assert isinstance(output, Tensor)  # the log-sum-exp was not asked for
    return output.unsqueeze(0), None


def uses_packed_attention(model: Any) -> bool:
    """Whether its attention wants micro-batches laid padding_free, common.data.batches.collate."""
    return bool(model.config._attn_implementation == PACKED_ATTENTION)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
