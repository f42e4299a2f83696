"""Where the tensors of a base model come from, one at a time: safetensors files, or random numbers for a dry run."""

import zlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from common.machine.device import Machine
from common.model.config import refuse_other_shape
from common.model.nf4 import STORED_SETTINGS, quantize, read_4bit, state_tensors
from common.model.safetensors_files import SafetensorsFolder
from common.recipe import ModelSpec, UserError


class RandomTensor:
    """Stands in for a tensor in a safetensors file: drawn when it is read, with its name as the seed."""

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


# A folder with complete safetensors files, or what random_state gives.
WeightsOrigin = Path | dict[str, RandomTensor]


class TensorSource:
    """Reads the tensors of a base model by name, for a model that is not loaded by from_pretrained."""

    def __init__(self, spec: ModelSpec, weights: WeightsOrigin, machine: Machine, *, double_quant: bool = True) -> None:
        self.spec, self.machine, self.double_quant = spec, machine, double_quant
        self.stored = SafetensorsFolder(weights) if isinstance(weights, Path) else None
        self.random = {} if isinstance(weights, Path) else weights
        self.names = self.stored.entries.keys() if self.stored else self.random.keys()

    def read_16bit(self, name: str, shape: torch.Size, device: torch.device | None = None) -> list[Tensor]:
        """A tensor in the compute dtype, alone in a list, on the device; None is the machine's.

        Raises UserError when it is missing, or has another shape.
        """
        if name not in self.names:
            raise UserError(f"{self.spec.name} is incomplete: {name} is missing")
        tensor = self.stored.read(name) if self.stored else self.random[name][...]
        refuse_other_shape(self.spec, name, tensor.shape, shape)
        return [tensor.to(device or self.machine.device, self.machine.dtype)]

    def read_4bit(self, name: str, shape: torch.Size) -> list[Tensor]:
        """A linear layer's weight in NF4: its packed bytes, then its scales (nf4.state_from_tensors reads them).

        shape: (out, in). Quantized here as load_4bit does, or as the model's files hold it where they have 4 bits.
        Raises UserError as read_16bit.
        """
        if self.stored and name + STORED_SETTINGS in self.names:
            packed, state = read_4bit(self.stored, name, self.machine.device, self.machine.dtype)
            refuse_other_shape(self.spec, name, state.shape, shape)
        else:
            (tensor,) = self.read_16bit(name, shape)
            packed, state = quantize(tensor, double_quant=self.double_quant)
        return [packed, *state_tensors(state)]
