"""The tensors of a base model, one at a time: from its safetensors files, or drawn at random from its config."""

import zlib
from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.machine.device import Machine
from common.model.safetensors_files import Shards
from common.recipe import ModelSpec, UserError

NF4_STATE = ".quant_state.bitsandbytes__nf4"  # of a 4-bit weight that was stored as such


class RandomTensor:
    """Stands in for a tensor in a safetensors file: drawn when it is read, from a seed that is its name."""

    def __init__(self, name: str, shape: torch.Size, std: float, machine: Machine) -> None:
        self.name, self.shape, self.std, self.machine = name, shape, std, machine
        self.dtype = machine.dtype

    def __getitem__(self, _: object) -> torch.Tensor:
        device, dtype = self.machine.device, self.machine.dtype
        if self.name.endswith("norm.weight"):
            return torch.ones(self.shape, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))
        return torch.empty(self.shape, dtype=dtype, device=device).normal_(0.0, self.std, generator=generator)


def random_state(config: PretrainedConfig, machine: Machine) -> dict[str, RandomTensor]:
    """A state dict of the whole model that takes no memory: normal weights with the config's initializer_range.

    `from_pretrained` reads it like a file, tensor by tensor, so a dry run loads through the same code as a real one.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return {
        name: RandomTensor(name, parameter.shape, config.initializer_range, machine)
        for name, parameter in skeleton.named_parameters()  # a tied head is named once
    }


class BaseWeights:
    """Where the tensors of a model come from: what a model is filled with that is not loaded as a whole."""

    def __init__(self, spec: ModelSpec, config: PretrainedConfig, folder: Path | None, machine: Machine) -> None:
        """folder: with complete safetensors files; None draws at random."""
        self.spec, self.machine = spec, machine
        self.random = random_state(config, machine) if folder is None else {}
        self.stored = Shards(folder) if folder is not None else None
        self.names = self.stored.entries.keys() if self.stored else self.random.keys()

    def in_16_bit(self, name: str, shape: torch.Size) -> list[Tensor]:
        """A tensor in the compute dtype, alone in a list, on the machine's device.

        Raises UserError when it is not there, or of another shape.
        """
        if name not in self.names:
            raise UserError(f"{self.spec.name} is incomplete: {name} is missing")
        tensor = self.stored.read(name) if self.stored else self.random[name][...]
        self._require_shape(name, tensor.shape, shape)
        return [tensor.to(self.machine.device, self.machine.dtype)]

    def in_4_bit(self, name: str, shape: torch.Size) -> list[Tensor]:
        """A linear layer's weight in NF4: its values, packed in bytes, and its scales as tensors (state_of reads them).

        Quantised as load_4bit does, or as it is stored where the checkpoint has 4 bits. Raises UserError as in_16_bit.
        """
        if self.stored and name + NF4_STATE in self.names:
            packed, state = stored_4bit(self.stored, name, self.machine.device)
            self._require_shape(name, state.shape, shape)
        else:
            (tensor,) = self.in_16_bit(name, shape)
            packed, state = bnb.quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
        parts = state.as_dict(packed=True)
        return [packed, *(parts[key] for key in STATE_KEYS if key in parts)]

    def _require_shape(self, name: str, stored: torch.Size, wanted: torch.Size) -> None:
        if stored != wanted:
            raise UserError(
                f"{self.spec.name} does not fit its config.json: {name} is {tuple(stored)}, the config says "
                f"{tuple(wanted)}"
            )


STATE_KEYS = (NF4_STATE[1:], "absmax", "quant_map", "nested_absmax", "nested_quant_map")


def state_of(parts: list[Tensor]) -> bnb.QuantState:
    """The scales of a weight, from what in_4_bit gave beside its values."""
    values = dict(zip(STATE_KEYS, parts, strict=False))  # the last two are there if the scales are quantised too
    values[STATE_KEYS[0]] = values[STATE_KEYS[0]].cpu()
    return bnb.QuantState.from_dict(values, device=parts[1].device)


def stored_4bit(stored: Shards, name: str, device: torch.device) -> tuple[Tensor, bnb.QuantState]:
    """A weight that is stored in 4 bits, and its scales."""
    parts = {
        key.removeprefix(f"{name}."): stored.read(key).to(device)
        for key in stored.entries
        if key.startswith(f"{name}.")
    }
    return stored.read(name).to(device), bnb.QuantState.from_dict(parts, device=device)


def make_linears_4bit(model: PreTrainedModel, dtype: torch.dtype, kind: type[Linear4bit] = Linear4bit) -> None:
    """Every linear layer of a model on meta but the head becomes 4-bit, as transformers does when it loads."""
    for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
        old = model.get_submodule(name)
        if old is not model.get_output_embeddings():
            shape = (old.in_features, old.out_features, old.bias is not None)
            model.set_submodule(name, kind(*shape, compute_dtype=dtype, quant_type="nf4", quant_storage=dtype))
