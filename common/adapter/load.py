"""Loads a trained adapter onto its base, and the tokenizer that goes with it."""

import re

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.adapter.config import MERGE_WITH_PEFT
from common.adapter.find import TrainedAdapter
from common.adapter.trained_base import find_trained_base
from common.machine.device import warn_of_unused_gpu
from common.model.generation_config import GENERATION_CONFIG, read_generation_config
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.pad_embedding import mend_pad_embedding
from common.recipe import ModelSpec, UserError
from common.run.folder import ADAPTER_WEIGHTS
from common.tokens.stop_ids import stop_ids

_DECODER_LINEAR = re.compile(r"model\.layers\.\d+\.")  # the head and the embedding are read without an adapter


def trained_tokenizer(adapter: TrainedAdapter) -> PreTrainedTokenizerFast:
    """Loads the tokenizer that the run saved, with its chat template; the base's where there is none in the folder."""
    spec = adapter.recipe.model
    if not (adapter.folder / "tokenizer.json").exists():
        return load_tokenizer(spec)
    tokenizer = load_tokenizer(ModelSpec(str(adapter.folder)), spec)
    if not tokenizer.chat_template and spec.chat_template is not None:  # one from elsewhere, and the recipe's template
        tokenizer = load_tokenizer(ModelSpec(str(adapter.folder), chat_template=spec.chat_template), spec)
    return tokenizer


def load_trained(adapter: TrainedAdapter, tokenizer: PreTrainedTokenizerFast | None = None) -> PeftModel:
    """Loads the 4-bit base and puts the adapter on it. In eval mode; inside `disable_adapter()` it is the base alone.

    Its generation config is the run's, else the base's, and stops at the end of the template's turns.
    tokenizer: of trained_tokenizer, where it is loaded already.

    Raises UserError as find_trained_base, load_4bit and attach_adapter.
    """
    if adapter.recipe.model.weights == "pretrained":
        find_trained_base(adapter)
    tokenizer = tokenizer or trained_tokenizer(adapter)
    warn_of_unused_gpu("computing")
    model = load_4bit(adapter.recipe.model)
    mend_pad_embedding(model, tokenizer)
    peft_model = attach_adapter(model, adapter, model.device)
    if (adapter.folder / GENERATION_CONFIG).exists():
        model.generation_config = read_generation_config(adapter.folder, str(adapter.folder))
    known = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = stop_ids(tokenizer, known)
    use_lean_layers(peft_model, adapter.recipe.train.kernels)
    return peft_model.eval()


def attach_adapter(base: PreTrainedModel, adapter: TrainedAdapter, device: torch.device) -> PeftModel:
    """Puts the adapter on the base: its weights in fp32, on `device`, frozen. The base may be on the meta device.

    Raises UserError unless the names and shapes in the adapter's file are exactly those of the model's parameters, and
    for an adapter that changes anything but linear layers of the decoder.
    """
    try:
        model = PeftModel(base, adapter.config, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"the adapter in {adapter.folder} does not fit {adapter.recipe.model.name}: {error}") from error
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and not _DECODER_LINEAR.match(name):
            raise UserError(
                f"the adapter in {adapter.folder} changes {name} (target_modules), and only linear layers of the "
                f"decoder layers can have adapters here; {MERGE_WITH_PEFT}"
            )
    weights = {
        name: tensor.float() for name, tensor in load_file(adapter.folder / ADAPTER_WEIGHTS, str(device)).items()
    }
    parameter_of = {_saved_name(name): name for name in model.state_dict() if ".default" in name}
    needed = {saved: model.get_parameter(name).shape for saved, name in parameter_of.items()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    foreign = sorted(name for name in given if ".lora_" not in name)
    if foreign:
        raise UserError(
            f"the adapter in {adapter.folder} holds {foreign[0]} as well, which is no part of LoRA (PEFT saves the "
            f"embedding where the vocabulary has grown): {MERGE_WITH_PEFT}; where it is the base's, save the adapter "
            "once more with save_embedding_layers=False"
        )
    if given != needed:
        odd = sorted(name for name in given.keys() | needed.keys() if given.get(name) != needed.get(name))[0]
        raise UserError(
            f"the adapter in {adapter.folder} does not fit {adapter.recipe.model.name}: {odd} is "
            f"{_describe_shape(given.get(odd))}, and the base needs {_describe_shape(needed.get(odd))}"
        )
    # PEFT's set_peft_model_state_dict would move the adapter to the base's device, which may be meta.
    state = {parameter_of[name]: tensor for name, tensor in weights.items()}
    model.load_state_dict(state, strict=False, assign=True)  # not strict: the base's weights are not among them
    model.requires_grad_(False)
    return model


def _saved_name(name: str) -> str:
    """The name in adapter_model.safetensors of a parameter of the model. "default" is PEFT's name for the adapter."""
    magnitude = ".lora_magnitude_vector.default.weight"  # DoRA's; PEFT saves it without ".weight"
    return name.removesuffix(".default.weight") if name.endswith(magnitude) else name.replace(".default", "")


def _describe_shape(shape: torch.Size | None) -> str:
    return "not there" if shape is None else "x".join(map(str, shape))
