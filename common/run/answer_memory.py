"""What an answer takes of memory beside the weights: the keys and values of its prompt, and what reading that takes.

Weights and layers are the stock ones here (see common.model.lean_layers), so a long prompt is read in parts: read at
once, 100,000 tokens of Llama 3 8B would take 8 GiB for the MLP of one layer alone.
"""

from typing import Any

from transformers import PretrainedConfig

from common.model.config import head_dim_of

# Of a prompt, read at a time. In the time in which a matmul reads its weight, an H100 computes 240 tokens
# (common/plan/speed.py); each part dequantizes all weights once.
PART_TOKENS = 2_048


def read_in_parts(tokens: int) -> dict[str, Any]:
    """Arguments of transformers' generate for a single prompt of so many tokens: a long one is read in parts."""
    return {"prefill_chunk_size": PART_TOKENS} if tokens > PART_TOKENS else {}


def cache_bytes(config: PretrainedConfig, tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of so many tokens in all layers, each in a number of `itemsize` bytes.

    A layer with a sliding window keeps those of the window.
    """
    window = getattr(config, "sliding_window", None) or tokens
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    kept = sum(min(tokens, window) if kind == "sliding_attention" else tokens for kind in kinds)
    return 2 * kept * config.num_key_value_heads * head_dim_of(config) * itemsize


def answer_bytes(config: PretrainedConfig, tokens: int, itemsize: int) -> int:
    """Bytes that an answer takes beside the weights, at the end of a prompt and an answer of so many tokens together.

    Beside cache_bytes: of one layer keys and values for each query head, and the mask of a part of the prompt, which
    attention adds to the scores. By the shapes of these tensors; not measured on a GPU.
    """
    expanded = 2 * tokens * config.num_attention_heads * head_dim_of(config) * itemsize
    mask = min(tokens, PART_TOKENS) * tokens * (1 + itemsize)
    return cache_bytes(config, tokens, itemsize) + expanded + mask
