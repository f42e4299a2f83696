"""A model's dimensions, attention and RoPE in GGUF's words.

Keys: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.adapter.tokenizer_json import TAKE_MERGE
from common.model.architectures import ARCHITECTURES
from common.model.config import head_dim_of
from common.model.rope_scaling import full_rope, original_positions, usable_positions
from common.recipe import UserError

# llama.cpp, llama-model.cpp: of a Gemma 3 every sixth layer attends to everything, unless the file says otherwise, and
# queries are scaled by their dimension; only those of the 27B, known by its layers, by hidden size / heads.
GEMMA, GEMMA_PERIOD, GEMMA_27B_LAYERS = "gemma3", 6, 62
# Kinds of RoPE that llama.cpp computes beside default and linear, by its name of the architecture. The factors of
# Llama 3.1 are a tensor, which it reads for "llama" alone.
ROPES_BESIDE = {"llama": ("yarn", "llama3"), "qwen2": ("yarn",), "qwen3": ("yarn",), GEMMA: ()}


def add_dimensions(writer: GGUFWriter, config: PretrainedConfig) -> None:
    head_dim = head_dim_of(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(usable_positions(config))
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
            writer.add_rope_scaling_orig_ctx_len(original_positions(config))
    if _is_gemma(config):
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        if slides != [bool((layer + 1) % GEMMA_PERIOD) for layer in range(len(slides))]:
            writer.add_sliding_window_pattern(slides)


def _is_gemma(config: PretrainedConfig) -> bool:
    return ARCHITECTURES[config.model_type].gguf_name == GEMMA


def refuse_other_attention(config: PretrainedConfig) -> None:
    """Raises UserError for a RoPE, and for attention of a Gemma, that GGUF cannot say or llama.cpp does not compute."""
    arch, rope = ARCHITECTURES[config.model_type].gguf_name, full_rope(config)
    if _is_gemma(config):
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
        sliding = config.rope_parameters["sliding_attention"]["rope_type"]
        if sliding != "default":
            raise UserError(
                f"a Gemma with {sliding} RoPE on its layers of sliding attention cannot be exported to GGUF, llama.cpp "
                f"scales the other layers alone; {TAKE_MERGE}"
            )
    if rope["rope_type"] not in ("default", "linear", *ROPES_BESIDE[arch]):
        raise UserError(
            f"a model with {rope['rope_type']} RoPE cannot be exported to GGUF, llama.cpp has none for {arch}; "
            f"{TAKE_MERGE}"
        )
    if rope["rope_type"] == "yarn":
        _refuse_other_yarn(config, rope)


def _refuse_other_yarn(config: PretrainedConfig, rope: dict[str, Any]) -> None:
    """llama.cpp (ggml_rope_yarn_corr_dims, rope_yarn) has these values of YaRN's paper in it, and reads no others."""
    factor = rope["factor"]
    ours = {
        "attention_factor": ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))[1],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "truncate": rope.get("truncate", True),
    }
    theirs = {"attention_factor": 0.1 * math.log(factor) + 1, "beta_fast": 32, "beta_slow": 1, "truncate": True}
    for key, value in ours.items():
        if abs(value - theirs[key]) > 1e-6:
            raise UserError(
                f"YaRN RoPE with {key} {value:g} cannot be exported to GGUF, llama.cpp takes {theirs[key]:g}; "
                f"{TAKE_MERGE}"
            )


def llama3_factors(config: PretrainedConfig) -> Tensor:
    """What each rotary frequency is divided by: fp32 (dim / 2,). GGUF keeps Llama 3.1's RoPE scaling as a tensor."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = 2 * len(scaled)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return plain / scaled
