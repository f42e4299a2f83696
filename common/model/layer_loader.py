"""Loads a base model a decoder layer at a time, through the loader of a run: in the memory of one layer.

It is the reference of a merge's self-check. So it shares no reader with the merge: the safetensors library reads the
files, and transformers and bitsandbytes choose which layers are 4-bit, quantise them, and dequantise them.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from common.machine.device import Machine
from common.model.loading import load_whole_model
from common.model.quantization import stored_quantization
from common.model.weight_files import weight_files
from common.process_state import quiet_transformers
from common.recipe import ModelSpec, UserError

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class LayerLoader:
    """Gives the tensors of a base model by name, in fp32, as the model computes with them after load_4bit."""

    def __init__(self, spec: ModelSpec, config: PretrainedConfig, folder: Path, machine: Machine) -> None:
        quiet_transformers(also_on_terminal=True)  # a bar for each layer
        self.spec, self.config, self.machine = spec, config, machine
        self.file_of: dict[str, Path] = {}
        for name in weight_files(folder):
            with safe_open(folder / name, framework="pt") as file:
                self.file_of |= dict.fromkeys(file.keys(), folder / name)
        self.number, self.layer = -1, nn.Module()  # the layer that is loaded

    def read(self, name: str, rows: slice | list[int] | None = None) -> Tensor:
        """A tensor, or rows of one that lies outside the layers: fp32, on the machine's device.

        Raises UserError when it is missing, and as load_whole_model.
        """
        module, key = self._find(name)
        if module is None:
            return self.read_stored(name, rows).to(self.machine.dtype).float()
        value: Any = module.get_parameter(key)
        if isinstance(module, Linear4bit) and key == "weight":
            value = bnb.dequantize_4bit(value.data, value.quant_state)
        tensor: Tensor = value.to(self.machine.dtype).float()
        return tensor

    def read_stored(self, name: str, rows: slice | list[int] | None = None) -> Tensor:
        """A tensor, or rows of it, in the dtype of its file, on the machine's device. Raises UserError as `read`."""
        with self._open([name]) as stored:
            part = stored[name]
            if rows is None:
                tensor = part[...]
            elif isinstance(rows, slice):
                first, last, _ = rows.indices(part.get_shape()[0])
                tensor = part[first:last]
            else:
                tensor = torch.cat([part[row : row + 1] for row in rows])
        return tensor.to(self.machine.device)

    def is_4bit(self, name: str) -> bool:
        module, key = self._find(name)
        return isinstance(module, Linear4bit) and key == "weight"

    def _find(self, name: str) -> tuple[nn.Module | None, str]:
        """The module of a decoder layer that has the parameter, and its name there; None outside the layers."""
        place = LAYER.fullmatch(name)
        if place is None:
            return None, ""
        if int(place[1]) != self.number:
            self.number, self.layer = int(place[1]), nn.Module()  # frees the one before
            self.layer = self._load(self.number)
        owner, _, key = place[2].rpartition(".")
        return self.layer.get_submodule(owner), key

    def _load(self, number: int) -> nn.Module:
        """Loads one layer: as that of a model which has no other layer, and a single token."""
        config = _cut_config(self.config, number)
        prefix = f"model.layers.{number}."
        names = [name for name in self.file_of if name.startswith(prefix)]
        with self._open([*names, "model.norm.weight"]) as stored:
            weights = {name.replace(prefix, "model.layers.0."): part for name, part in stored.items()}
            weights["model.embed_tokens.weight"] = torch.zeros(1, config.hidden_size)
            quantizes = self.spec.bits == 4 and stored_quantization(config) is None
            model = load_whole_model(self.spec, config, weights, self.machine, GenerationConfig(), quantizes=quantizes)
        return model.get_submodule("model.layers.0")

    @contextmanager
    def _open(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Parts of open files by name, each of which gives its tensor, or rows of it, when it is indexed.

        The files are mapped, and only for as long as they are open: mapped pages count as memory of the process. The
        library's other way, `pread`, would read a whole tensor for each row.
        """
        missing = next((name for name in names if name not in self.file_of), None)
        if missing is not None:
            raise UserError(f"{self.spec.name} is incomplete: {missing} is missing")
        files = {path: safe_open(path, framework="pt") for path in {self.file_of[n] for n in names}}
        yield {name: files[self.file_of[name]].get_slice(name) for name in names}


def _cut_config(config: PretrainedConfig, number: int) -> PretrainedConfig:
    """The config of a model that has only the layer of this number, and a vocabulary of one token."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers, cut.vocab_size, cut.tie_word_embeddings, cut.pad_token_id = 1, 1, True, None
    if getattr(config, "layer_types", None):
        cut.layer_types = [config.layer_types[number]]
    stored = getattr(cut, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("llm_int8_skip_modules"):
        skipped = [_name_in_cut(name, number) for name in stored["llm_int8_skip_modules"]]
        stored["llm_int8_skip_modules"] = [name for name in skipped if name is not None]
    return cut


def _name_in_cut(name: str, number: int) -> str | None:
    """The name of a module in the cut model; None for one of another layer."""
    place = re.match(r"model\.layers\.(\d+)(?=\.|$)", name)
    if place is None:
        return name
    return f"model.layers.0{name[place.end() :]}" if int(place[1]) == number else None
