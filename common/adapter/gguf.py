"""Writes GGUF files for llama.cpp and programs built on it: the merged model, or the adapter alone.

Keys and layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package has the names of the tensors.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from common.adapter.find import TrainedAdapter
from common.adapter.gguf_dimensions import GEMMA, add_dimensions, llama3_factors, refuse_other_attention
from common.adapter.gguf_kinds import FILE_TYPES, Quant, gguf_kind
from common.adapter.gguf_tokenizer import MAX_ENDING_TOKENS, add_tokenizer, ending_tokens, read_vocabulary
from common.adapter.k_quants import K_QUANTS, quantize_k
from common.adapter.load import attach_adapter
from common.adapter.merge import PEFT_PREFIX, MergedWeights
from common.adapter.sampling import add_sampling, untranslated
from common.adapter.tokenizer_files import trained_generation_config
from common.machine.slow_work import report_slow_work
from common.model.architectures import ARCHITECTURES
from common.model.rope_scaling import full_rope
from common.model.safetensors_files import Entry
from common.recipe import UserError
from common.run.folder import ADAPTER_WEIGHTS

CONVERTED_ROWS = 1 << 13  # rows of a tensor that are converted at a time


class _TensorQueue:
    """The tensors of a GGUF file: first all are declared, as its header wants, then each is made and written in turn.

    So only one tensor at a time is in memory.
    """

    def __init__(self, writer: GGUFWriter) -> None:
        self.writer = writer
        self.sources: list[tuple[Kind, Callable[[], Tensor]]] = []

    def add(self, name: str, shape: tuple[int, ...], kind: Kind, source: Callable[[], Tensor]) -> None:
        """Declares a tensor of `kind`; `source` makes it when its turn comes."""
        stored, size = quant_shape_to_byte_shape(shape, kind), stored_bytes(shape, kind)
        self.writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=kind)
        self.sources.append((kind, source))

    def write(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        with report_slow_work("writing GGUF", len(self.sources), "tensors") as work:
            for kind, source in self.sources:
                tensor = source()
                self.writer.write_tensor_data(
                    np.concatenate([_pack(part, kind) for part in tensor.split(CONVERTED_ROWS)])
                )
                work.done += 1
        self.writer.close()


def stored_bytes(shape: tuple[int, ...], kind: Kind) -> int:
    """Of a tensor in the file."""
    return int(np.prod(quant_shape_to_byte_shape(shape, kind)))


def _pack(rows: Tensor, kind: Kind) -> np.ndarray:
    return quantize_k(rows, kind) if kind in K_QUANTS else quantize(rows.float().cpu().numpy(), kind)


class GgufModel:
    """The merged model, to be written as a GGUF file.

    Raises UserError, when it is made, for a tokenizer or a kind of RoPE that GGUF cannot express. size: in bytes, close
    to that of the file. generation: the values of the generation config. notes: what of tokenizer and generation config
    llama.cpp does otherwise, or not at all.
    """

    def __init__(self, weights: MergedWeights, tokenizer: PreTrainedTokenizerFast, name: str, quant: Quant) -> None:
        self.weights, self.tokenizer, self.name, self.quant = weights, tokenizer, name, quant
        config = weights.config
        self.generation = trained_generation_config(weights.adapter, weights.folder, tokenizer)
        self.vocabulary = read_vocabulary(tokenizer, config.vocab_size)
        self.notes = [*self.vocabulary.rules.notes, *self._untold()]
        refuse_other_attention(config)
        self.tensors = list(self._find_tensors())
        self.size = sum(stored_bytes(entry.shape, kind) for _, entry, kind in self.tensors)

    def write(self, path: Path) -> None:
        config = self.weights.config
        arch = ARCHITECTURES[config.model_type].gguf_name
        _, file_type = FILE_TYPES[self.quant]
        writer = GGUFWriter(path, arch)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_dimensions(writer, config)
        add_tokenizer(writer, self.tokenizer, self.vocabulary, self.generation["eos_token_id"])
        add_sampling(writer, self.generation)
        tensors = _TensorQueue(writer)
        if full_rope(config)["rope_type"] == "llama3":
            factors = llama3_factors(config)
            tensors.add("rope_freqs.weight", tuple(factors.shape), Kind.F32, lambda: factors)
        for name, entry, kind in self.tensors:
            tensors.add(name, entry.shape, kind, partial(self._tensor, entry.name))
        tensors.write()

    def _find_tensors(self) -> Iterator[tuple[str, Entry, Kind]]:
        """Yields GGUF's name of each tensor, where it comes from, and its format."""
        config = self.weights.config
        names, layers, tied = gguf_names(config), config.num_hidden_layers, config.tie_word_embeddings
        for entry in (entry for shard in self.weights.shards for entry in shard.entries):
            name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
            if name is not None:  # older checkpoints hold rotary frequencies, which llama.cpp computes
                yield name, entry, gguf_kind(name, entry.shape, self.quant, layers, tied=tied)

    def _untold(self) -> list[str]:
        """What the file does not say of the generation config."""
        unnamed = ending_tokens(self.tokenizer, self.generation["eos_token_id"])[MAX_ENDING_TOKENS:]
        lost = [f"eos_token_id {self.tokenizer.convert_ids_to_tokens(index)}" for index in unnamed]
        lost += untranslated(self.generation)
        return [f"GGUF has no words for this of the generation config: {', '.join(lost)}"] if lost else []

    def _tensor(self, name: str) -> Tensor:
        tensor = self.weights.merged(name)
        if ARCHITECTURES[self.weights.config.model_type].gguf_name == GEMMA and name.endswith("norm.weight"):
            tensor = tensor.float() + 1  # llama.cpp multiplies by what it reads
        return permute_heads(tensor, name, self.weights.config)


def write_adapter(adapter: TrainedAdapter, config: PretrainedConfig, path: Path, name: str) -> None:
    """Writes the adapter alone, in f32 as it was trained, to be used with a GGUF of the base.

    Raises UserError for DoRA, layers with ranks or alphas of their own, and a scaled RoPE, which a GGUF adapter cannot
    have, and as attach_adapter.
    """
    if adapter.recipe.model.rope_scaling is not None:
        raise UserError(
            "an adapter that was trained with ModelSpec.rope_scaling cannot be exported alone: a GGUF adapter says "
            "nothing of it, and a GGUF of the base has another RoPE; take FORMAT=gguf"
        )
    if adapter.config.use_dora:
        raise UserError("a DoRA adapter cannot be exported alone: GGUF adapters are plain LoRA; take FORMAT=gguf")
    if adapter.config.rank_pattern or adapter.config.alpha_pattern:
        raise UserError("an adapter with ranks of its own for some layers cannot be exported alone; take FORMAT=gguf")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    attach_adapter(base, adapter, torch.device("cpu"))  # refuses a file that does not fit
    rank, alpha = adapter.config.r, adapter.config.lora_alpha
    writer = GGUFWriter(path, ARCHITECTURES[config.model_type].gguf_name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp scales by alpha / rank. rslora's scale is alpha / sqrt(rank) = (alpha * sqrt(rank)) / rank.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha * rank**0.5 if adapter.config.use_rslora else alpha)
    tensors = _TensorQueue(writer)
    names = gguf_names(config)
    for saved, tensor in load_file(adapter.folder / ADAPTER_WEIGHTS).items():
        linear, _, part = saved.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if part == "B":
            tensor = permute_heads(tensor, f"{linear}.weight", config)
        place = names.get_name(f"{linear}.weight", try_suffixes=(".weight",))
        tensors.add(f"{place}.lora_{part.lower()}", tuple(tensor.shape), Kind.F32, partial(torch.clone, tensor))
    tensors.write()


def gguf_names(config: PretrainedConfig) -> gguf.TensorNameMap:
    """The map from transformers' names of a model's tensors to GGUF's."""
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == ARCHITECTURES[config.model_type].gguf_name)
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def permute_heads(tensor: Tensor, name: str, config: PretrainedConfig) -> Tensor:
    """Reorders the rows of Llama's query and key weights for llama.cpp; returns any other tensor as it is.

    RoPE rotates pairs of values. transformers pairs value i of a head with value i + dim / 2, llama.cpp neighbours.
    tensor: (heads * dim, ...), a weight or an adapter's B.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2] if "." in name else ""
    if part not in heads or ARCHITECTURES[config.model_type].gguf_name != "llama":
        return tensor
    return tensor.view(heads[part], 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
