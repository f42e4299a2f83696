"""The model families that the recipes fine-tune, in one table.

To add a family, add a line here. `common.model.lean_layers` reads transformers' decoder layer, attention and MLP
classes through it, and `common.adapter.gguf` the name that GGUF files use. A family also needs new code where its
layers compute something else than Llama's (lean_layers) or its weights lie in another order (gguf.permuted).
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Architecture:
    model_type: str  # as in config.json
    class_prefix: str  # of transformers' classes, such as LlamaAttention
    gguf_name: str  # of llama.cpp's architecture that runs it
    overflows_in_fp16: bool = False  # its activations exceed 65504, the largest fp16 number

    def layer_class(self, part: str) -> Any:
        """transformers' class of a part of a layer: "DecoderLayer", "Attention", "MLP" or "RMSNorm"."""
        name = self.model_type.removesuffix("_text")  # the text part of a model of pictures too shares its module
        module = import_module(f"transformers.models.{name}.modeling_{name}")
        return getattr(module, self.class_prefix + part)


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", "Llama", "llama"),
        Architecture("mistral", "Mistral", "llama"),
        Architecture("qwen2", "Qwen2", "qwen2", overflows_in_fp16=True),
        Architecture("qwen3", "Qwen3", "qwen3", overflows_in_fp16=True),
        Architecture("gemma3_text", "Gemma3", "gemma3", overflows_in_fp16=True),
    )
}
