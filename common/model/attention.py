"""Attention over packed rows in which no token sees another example, registered with transformers as "packed".

The rows of a micro-batch lie one after another, (1, tokens), and flash attention takes the places where examples begin.
It needs no mask and no padding, and its memory grows with the tokens, not with their square. It comes with torch (2.10
or newer, NVIDIA GPUs from the RTX 30 series on, heads of up to 256 numbers). Elsewhere transformers' SDPA with a
block-diagonal mask gives the same result.

Importing this module adds "packed" to transformers' attention functions, for the whole process. It changes none of
those that are there, and only a model whose config names "packed" uses it.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig

from common.machine.device import Machine
from common.model.config import head_dim_of

PACKED_ATTENTION = "packed"
MIN_FLASH_CAPABILITY = (8, 0)  # CUDA compute capability; torch, ATen/native/transformers/cuda
# Of a head, in numbers: a multiple of the one, and at most the other (torch, flash_attn/flash_api.cpp, mha_varlen_bwd).
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 256
_ARGUMENTS = inspect.signature(varlen_attn).parameters
# torch 2.10 takes is_causal, and key and value with fewer heads; later versions have other arguments for both.
_CAUSAL: dict[str, Any] = {"is_causal": True} if "is_causal" in _ARGUMENTS else {"window_size": (-1, 0)}
if "enable_gqa" in _ARGUMENTS:
    _CAUSAL["enable_gqa"] = True
# The operators that compute attention's output and log-sum-exp, which the policy "keep attention" keeps.
ATTENTION_OPERATORS = (
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def attention_implementation(machine: Machine, config: PretrainedConfig) -> str:
    """transformers' name of the attention for this machine and model: "packed", or "sdpa" where flash attention is not
    for one of them."""
    return attention_of(torch.cuda.get_device_capability(machine.device), config) if machine.is_gpu else "sdpa"


def attention_of(capability: tuple[int, int], config: PretrainedConfig) -> str:
    """The same for a GPU of this compute capability. A model with dropout in its attention needs "sdpa" too."""
    head_dim = head_dim_of(config)
    fits = head_dim % HEAD_DIM_MULTIPLE == 0 and head_dim <= MAX_HEAD_DIM
    dropout = getattr(config, "attention_dropout", 0.0)
    return PACKED_ATTENTION if capability >= MIN_FLASH_CAPABILITY and fits and not dropout else "sdpa"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example, in transformers' form.

    query: bf16 or fp16 (1, heads, tokens, dim); key and value: the same with the model's fewer heads. cu_seq_lens_q:
    int32 (examples + 1,), where each example begins, and the end. max_length_q: tokens in the longest. sliding_window:
    tokens that each token sees, itself among them. Returns (1, tokens, heads, dim).

    transformers makes no mask for an attention that it does not know, so generating from prompts of several lengths
    needs "sdpa". Raises ValueError without the lengths, for dropout, and for a scaling or a window that this torch
    lacks.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("packed attention needs cu_seq_lens_q and max_length_q, see common.data.batches.collate")
    if dropout:
        raise ValueError(
            f"packed attention has no dropout, and the model's attention_dropout is {dropout}: set it to 0"
        )
    options = dict(_CAUSAL)
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        if "scale" not in _ARGUMENTS:
            raise ValueError(f"torch {torch.__version__} has no packed attention that scales by {scaling}")
        options["scale"] = scaling
    if sliding_window is not None and sliding_window < max_length_q:
        if "window_size" not in _ARGUMENTS:
            raise ValueError(f"torch {torch.__version__} has no packed attention with a window of {sliding_window}")
        options["window_size"] = (sliding_window - 1, 0)
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    output = varlen_attn(q, k, v, *lengths, **options)
    assert isinstance(output, Tensor)  # and not a pair with the log-sum-exp, which needs return_aux
    return output.unsqueeze(0), None


def uses_packed_attention(model: Any) -> bool:
    """Whether the model takes micro-batches in the form of common.data.batches.collate(padding_free=True)."""
    return bool(model.config._attn_implementation == PACKED_ATTENTION)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
