"""A model whose decoder layers have no weights yet, and the functions that give them their weights.

No card of a sharded run has room for the whole model. So the work is split over two calls of a recipe:

1. `load_4bit`, with a layout that shards, calls `build_hollow_model`. The embedding, the last norm and the head have
   their weights. The decoder layers have tensors of the right shapes that take no memory, which is all that LoRA, the
   lean layers and activation checkpointing need. The model's attribute `layer_weights`, a `TensorSource`, says where
   the missing weights are to be read.
2. `common.model.sharding.shard_layers`, which `train` calls, takes that attribute off the model with
   `take_layer_weights`. Then it fills one layer with `fill_layer`, shards it, and goes on with the next, so that at
   most one layer is whole at a time.
"""

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.machine.device import Machine
from common.machine.layout import Layout
from common.machine.shared_memory import read_once_per_machine
from common.model.activation_checkpointing import decoder_layers
from common.model.attention import attention_implementation
from common.model.host_embedding import use_host_embedding
from common.model.nf4 import (
    keep_packed_form,
    make_linears_4bit,
    names_of_4bit_linears,
    quantization_config,
    state_from_tensors,
)
from common.model.quantization import QUANT_TYPE
from common.model.tensor_source import TensorSource, WeightsOrigin
from common.recipe import ModelSpec, UserError


def build_hollow_model(
    spec: ModelSpec, config: PretrainedConfig, weights: WeightsOrigin, machine: Machine, layout: Layout
) -> PreTrainedModel:
    """The model without the weights of its decoder layers, and with `layer_weights` to read them from.

    The empty layers are on the CPU, where PEFT makes its adapters. An embedding that is to wait in host memory is read
    straight to it. Raises UserError when
    the weights outside the layers are missing, or have other shapes than the config says.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=machine.dtype, attn_implementation=attention_implementation(machine, config)
        )
        if spec.bits == 4:
            make_linears_4bit(model, names_of_4bit_linears(model), machine.dtype)
    model.is_loaded_in_4bit = spec.bits == 4
    model.planned_layout = layout
    model.layer_weights = source = TensorSource(
        spec, weights, machine, double_quant=quantization_config(config, machine.dtype).bnb_4bit_use_double_quant
    )
    embedding = model.get_input_embeddings()
    in_layers = {parameter for layer in decoder_layers(model) for parameter in layer.parameters()}
    for name, parameter in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        if parameter in in_layers:
            made = _without_memory(parameter)
        else:
            waits = layout.embedding_on_host and parameter is embedding.weight
            device = torch.device("cpu") if waits else machine.device
            (value,) = read_once_per_machine(device, source.read_16bit, name, parameter.shape, device)
            made = nn.Parameter(value)
        setattr(model.get_submodule(owner), key, made.requires_grad_(False))
    model.tie_weights()
    model.base_model.rotary_emb = type(model.base_model.rotary_emb)(config=config).to(machine.device)
    if layout.embedding_on_host:
        use_host_embedding(model)
    if hasattr(embedding, "scalar_embed_scale"):  # Gemma's
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=machine.device)
    unmade = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not unmade, unmade  # a buffer that no file holds, and that is not made above
    for module in model.modules():
        if isinstance(module, Linear4bit):
            keep_packed_form(module)
    return model.eval()


def _without_memory(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape, all of whose values are one number in memory."""
    hollow = torch.empty((), dtype=parameter.dtype).expand(parameter.shape)
    # PEFT asks a 4-bit weight how it was quantized.
    return Params4bit(hollow, quant_type=QUANT_TYPE) if isinstance(parameter, Params4bit) else nn.Parameter(hollow)


def planned_layout(model: nn.Module) -> Layout | None:
    """The layout that load_4bit was given, of a model whose layers it left empty; None for any other model."""
    layout = getattr(model, "planned_layout", None)
    assert layout is None or isinstance(layout, Layout)
    return layout


def take_layer_weights(model: PreTrainedModel) -> TensorSource:
    """The `layer_weights` that build_hollow_model left on the model, which then no longer has them.

    Raises UserError for a model that is not hollow.
    """
    source = model.__dict__.pop("layer_weights", None)
    if source is None:
        raise UserError(
            "the plan shards the layers, and the recipe has loaded them whole: write "
            "load_4bit(recipe.model, layout=plan.layout) in it"
        )
    assert isinstance(source, TensorSource)
    return source


def fill_layer(layer: nn.Module, prefix: str, source: TensorSource, *, whole: bool = False) -> None:
    """Reads the layer's frozen weights onto the machine's device, once for all processes of a machine.

    prefix: the layer's name in the base model, such as "model.layers.3". whole: the layer is not to be sharded, and its
    4-bit weights are as load_4bit makes them elsewhere. Raises UserError as TensorSource does.
    """
    device = source.machine.device
    for path, module in layer.named_modules():
        name = ".".join(part for part in (prefix, path) if part).replace(".base_layer", "")  # PEFT's
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                continue
            if isinstance(module, Linear4bit) and key == "weight":
                shape = torch.Size((module.out_features, module.in_features))
                packed, *scales = read_once_per_machine(device, source.read_4bit, f"{name}.weight", shape)
                state = module.quant_state = state_from_tensors(scales)
                if whole:
                    module.weight = whole_4bit_weight(packed, state)
                    continue
                # FSDP2 can shard bytes too, but bitsandbytes reads a gathered weight only in the dtype of the model.
                value = packed.flatten().view(module.quant_storage)[:, None]
            else:
                (value,) = read_once_per_machine(device, source.read_16bit, f"{name}.{key}", parameter.shape)
            setattr(module, key, nn.Parameter(value, requires_grad=False))


def whole_4bit_weight(packed: Tensor, state: bnb.QuantState) -> Params4bit:
    return Params4bit(
        packed,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        bnb_quantized=True,
    )
