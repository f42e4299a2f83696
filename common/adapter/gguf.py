"""GGUF files for llama.cpp and what is built on it: the merged model, or the adapter alone.

Keys and layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md; names of tensors from the gguf package.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType, RopeScalingType
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.adapter.gguf_tokenizer import add_tokenizer, read_vocabulary
from common.adapter.load import TrainedAdapter
from common.adapter.merge import PEFT_PREFIX, MergedWeights
from common.model.architectures import ARCHITECTURES
from common.recipe import UserError
from common.run.folder import ADAPTER_WEIGHTS

Quant = Literal["f16", "bf16", "q8_0"]
QUANT_KINDS = {
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
CONVERTED_ROWS = 1 << 13  # of a tensor, converted at a time


class _Tensors:
    """Tensors that are announced first and written when their turn comes, in the memory of one."""

    def __init__(self, writer: GGUFWriter) -> None:
        self.writer = writer
        self.sources: list[tuple[Kind, Callable[[], Tensor]]] = []

    def add(self, name: str, shape: tuple[int, ...], kind: Kind, source: Callable[[], Tensor]) -> None:
        if kind == Kind.Q8_0 and shape[-1] % 32:  # values a scale
            kind = Kind.F16
        stored = quant_shape_to_byte_shape(shape, kind)
        size = int(np.prod(stored))
        self.writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=kind)
        self.sources.append((kind, source))

    def write(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        for kind, source in self.sources:
            tensor = source()
            parts = [quantize(part.float().cpu().numpy(), kind) for part in tensor.split(CONVERTED_ROWS)]
            self.writer.write_tensor_data(np.concatenate(parts))
        self.writer.close()


class GgufModel:
    """The merged model on its way into a GGUF file. Raises UserError for what GGUF has no words for."""

    def __init__(self, weights: MergedWeights, tokenizer: PreTrainedTokenizerFast, name: str, quant: Quant) -> None:
        self.weights, self.tokenizer, self.name, self.quant = weights, tokenizer, name, quant
        config = weights.config
        self.vocabulary = read_vocabulary(weights.adapter.folder, config.vocab_size)
        _refuse_other_rope(config)
        entries = [entry for shard in weights.shards for entry in shard.entries]
        self.size = sum(entry.size for entry in entries) * {"q8_0": 17}.get(quant, 32) // 32

    def write(self, path: Path) -> None:
        config, weights = self.weights.config, self.weights
        arch = ARCHITECTURES[config.model_type].gguf_name
        kind, file_type = QUANT_KINDS[self.quant]
        writer = GGUFWriter(path, arch)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_dimensions(writer, config)
        add_tokenizer(writer, self.tokenizer, self.vocabulary)
        tensors = _Tensors(writer)
        if config.rope_parameters["rope_type"] == "llama3":
            factors = _llama3_factors(config)
            tensors.add("rope_freqs.weight", tuple(factors.shape), Kind.F32, lambda: factors)
        names = gguf_names(config)
        for entry in (entry for shard in weights.shards for entry in shard.entries):
            name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
            if name is None:  # rotary frequencies that older checkpoints hold
                continue
            kind_here = kind if len(entry.shape) > 1 else Kind.F32
            tensors.add(name, entry.shape, kind_here, partial(self._tensor, entry.name))
        tensors.write()

    def _tensor(self, name: str) -> Tensor:
        return permuted(self.weights.merged(name), name, self.weights.config)


def write_adapter(adapter: TrainedAdapter, config: PretrainedConfig, path: Path, name: str) -> None:
    """The adapter alone, f32 as it was trained: for a GGUF of the base. Raises UserError for DoRA."""
    if adapter.config.use_dora:
        raise UserError("a DoRA adapter cannot be exported alone: GGUF adapters are plain LoRA; take FORMAT=gguf")
    if adapter.config.rank_pattern or adapter.config.alpha_pattern:
        raise UserError("an adapter with ranks of its own for some layers cannot be exported alone; take FORMAT=gguf")
    rank, alpha = adapter.config.r, adapter.config.lora_alpha
    writer = GGUFWriter(path, ARCHITECTURES[config.model_type].gguf_name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp scales by alpha / rank; with rslora the scale is alpha / sqrt(rank).
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha * rank**0.5 if adapter.config.use_rslora else alpha)
    tensors = _Tensors(writer)
    names = gguf_names(config)
    for saved, tensor in load_file(adapter.folder / ADAPTER_WEIGHTS).items():
        linear, _, part = saved.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if part == "B":
            tensor = permuted(tensor, f"{linear}.weight", config)
        place = names.get_name(f"{linear}.weight", try_suffixes=(".weight",))
        tensors.add(f"{place}.lora_{part.lower()}", tuple(tensor.shape), Kind.F32, partial(torch.clone, tensor))
    tensors.write()


def gguf_names(config: PretrainedConfig) -> gguf.TensorNameMap:
    """transformers' names of a model's tensors in GGUF's words."""
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == ARCHITECTURES[config.model_type].gguf_name)
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def permuted(tensor: Tensor, name: str, config: PretrainedConfig) -> Tensor:
    """Rows of Llama's queries and keys as GGUF has them: it rotates neighbours, transformers the two halves of a head.

    tensor: (heads * dim, ...); also B of an adapter. All else is as it was.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2] if "." in name else ""
    if part not in heads or ARCHITECTURES[config.model_type].gguf_name != "llama":
        return tensor
    return tensor.view(heads[part], 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _add_dimensions(writer: GGUFWriter, config: PretrainedConfig) -> None:
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
    rope = config.rope_parameters
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        kind = RopeScalingType.LINEAR if rope["rope_type"] == "linear" else RopeScalingType.YARN
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == RopeScalingType.YARN:
            original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
            writer.add_rope_scaling_orig_ctx_len(original)


def _refuse_other_rope(config: PretrainedConfig) -> None:
    kind = config.rope_parameters["rope_type"]
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise UserError(f"a model with {kind} RoPE cannot be exported to GGUF")


def _llama3_factors(config: PretrainedConfig) -> Tensor:
    """What each rotary frequency is divided by: fp32 (dim / 2,). Llama 3.1's scaling, as a tensor of its own."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = 2 * len(scaled)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return plain / scaled
