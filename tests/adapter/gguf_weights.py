"""Reads a GGUF file of Llama's architecture with the gguf package alone, back into a model of transformers."""

from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import dequantize


def read_gguf(path: Path, model: Any) -> set[str]:
    """Gives the model's parameters the values of the file, all of which it needs. Returns the tensors' names there."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    read = set()
    for name, parameter in model.named_parameters():  # a tied head is the embedding: named once
        place = names.get_name(name, try_suffixes=(".weight",))
        values = torch.from_numpy(dequantize(stored[place].data, stored[place].tensor_type).copy())
        if "q_proj" in name or "k_proj" in name:  # pairs that are rotated stand side by side
            values = values.view(-1, model.config.head_dim // 2, 2, values.shape[-1]).transpose(1, 2)
        parameter.data.copy_(values.reshape(parameter.shape))
        read.add(place)
    assert read == stored.keys()
    return read
