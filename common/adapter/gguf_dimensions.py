"""A model's dimensions, attention and RoPE in GGUF's words.

Keys: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.adapter.tokenizer_json import TAKE_MERGE
from common.model.architectures import ARCHITECTURES
from common.recipe import UserError

# llama.cpp, llama-model.cpp: of a Gemma 3 every sixth layer attends to everything, unless the file says otherwise, and
# queries are scaled by their dimension; only those of the 27B, known by its layers, by hidden size / heads.
GEMMA, GEMMA_PERIOD, GEMMA_27B_LAYERS = "gemma3", 6, 62


def add_dimensions(writer: GGUFWriter, config: PretrainedConfig) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = full_rope(config)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        kind = RopeScalingType.LINEAR if rope["rope_type"] == "linear" else RopeScalingType.YARN
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == RopeScalingType.YARN:
            original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
            writer.add_rope_scaling_orig_ctx_len(original)
    if _is_gemma(config):
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        if slides != [bool((layer + 1) % GEMMA_PERIOD) for layer in range(len(slides))]:
            writer.add_sliding_window_pattern(slides)


def _is_gemma(config: PretrainedConfig) -> bool:
    return ARCHITECTURES[config.model_type].gguf_name == GEMMA


def full_rope(config: PretrainedConfig) -> dict[str, Any]:
    """The RoPE of layers that attend to everything; Gemma's others have one of their own."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def refuse_other_attention(config: PretrainedConfig) -> None:
    """Raises UserError for a kind of RoPE, and for attention of a Gemma, that GGUF has no words for."""
    kinds, known = {full_rope(config)["rope_type"]}, {"default", "linear", "yarn", "llama3"}
    if _is_gemma(config):
        kinds, known = (
            kinds | {config.rope_parameters["sliding_attention"]["rope_type"]} - {"default"},
            {"default", "linear"},
        )
        is_27b = config.num_hidden_layers == GEMMA_27B_LAYERS
        divisor = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
        if config.query_pre_attn_scalar != divisor:
            raise UserError(
                f"a Gemma with query_pre_attn_scalar {config.query_pre_attn_scalar} cannot be exported to GGUF, "
                f"llama.cpp takes {divisor}; {TAKE_MERGE}"
            )
        if "sliding_attention" not in config.layer_types:
            raise UserError(
                f"a Gemma without a layer of sliding attention cannot be exported to GGUF, llama.cpp stops at it; "
                f"{TAKE_MERGE}"
            )
    for kind in sorted(kinds - known):
        raise UserError(f"a model with {kind} RoPE cannot be exported to GGUF; {TAKE_MERGE}")


def llama3_factors(config: PretrainedConfig) -> Tensor:
    """What each rotary frequency is divided by: fp32 (dim / 2,). GGUF keeps Llama 3.1's RoPE scaling as a tensor."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = 2 * len(scaled)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return plain / scaled
