"""Reads an adapter's weights for a model that has adapters, and refuses those that do not fit it."""

import re
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from common.model.adapter_config import MERGE_WITH_PEFT
from common.model.adapter_files import ADAPTER_WEIGHTS
from common.recipe import UserError

_DECODER_LINEAR = re.compile(r"model\.layers\.\d+\.")  # the head and the embedding are read without an adapter


def read_adapter_weights(model: PeftModel, folder: Path, base: str, device: torch.device) -> dict[str, Tensor]:
    """The adapter's weights in fp32, on `device`, by the names of the model's parameters.

    base: the base's name, for messages. Raises UserError unless the names and shapes in the adapter's file are exactly
    those of the model's parameters, and for an adapter that changes anything but linear layers of the decoder.
    """
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and not _DECODER_LINEAR.match(name):
            raise UserError(
                f"the adapter in {folder} changes {name} (target_modules), and only linear layers of the "
                f"decoder layers can have adapters here; {MERGE_WITH_PEFT}"
            )
    weights = {name: tensor.float() for name, tensor in load_file(folder / ADAPTER_WEIGHTS, str(device)).items()}
    parameter_of = {_saved_name(name): name for name in model.state_dict() if ".default" in name}
    needed = {saved: model.get_parameter(name).shape for saved, name in parameter_of.items()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    foreign = sorted(name for name in given if ".lora_" not in name)
    if foreign:
        raise UserError(
            f"the adapter in {folder} holds {foreign[0]} as well, which is no part of LoRA (PEFT saves the "
            f"embedding where the vocabulary has grown): {MERGE_WITH_PEFT}; where it is the base's, save the adapter "
            "once more with save_embedding_layers=False"
        )
    if given != needed:
        odd = sorted(name for name in given.keys() | needed.keys() if given.get(name) != needed.get(name))[0]
        raise UserError(
            f"the adapter in {folder} does not fit {base}: {odd} is "
            f"{_describe_shape(given.get(odd))}, and the base needs {_describe_shape(needed.get(odd))}"
        )
    return {parameter_of[name]: tensor for name, tensor in weights.items()}


def _saved_name(name: str) -> str:
    """The name in adapter_model.safetensors of a parameter of the model. "default" is PEFT's name for the adapter."""
    magnitude = ".lora_magnitude_vector.default.weight"  # DoRA's; PEFT saves it without ".weight"
    return name.removesuffix(".default.weight") if name.endswith(magnitude) else name.replace(".default", "")


def _describe_shape(shape: torch.Size | None) -> str:
    return "not there" if shape is None else "x".join(map(str, shape))
