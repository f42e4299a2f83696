"""The recipe's own model on fake tensors, which have a shape and a dtype and no data.

It is built from the config, by the functions that a run uses: adapters, fused loss, lean layers. Its tensors are on the
device "cpu", because a torch without CUDA refuses to index fake CUDA tensors. What differs on a GPU is chosen by name
instead of by device: the attention, and the dtype of the compute.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from common.kernels.nf4_dequantize import SCALES_PER_OUTER_SCALE, VALUES_PER_SCALE
from common.model.activation_checkpointing import decoder_layers
from common.model.config import load_config
from common.model.lean_layers import swap_in_lean_classes, unsupported_reason
from common.model.lora import attach_lora
from common.model.loss import fuse_head_and_loss
from common.model.nf4 import make_linears_4bit, quantization_config
from common.model.quantization import QUANT_TYPE
from common.model.rope_scaling import keep_frequencies
from common.recipe import Kernels, LoraSpec, ModelSpec


def fake_lora_model(
    spec: ModelSpec,
    lora: LoraSpec,
    layers: int,
    mode: FakeTensorMode,
    *,
    in_4bit: Collection[str],
    dtype: torch.dtype,
    attention: str,
    kernels: Kernels,
) -> PeftModel:
    """The first `layers` layers of the recipe's model with adapters, in training mode.

    It is what load_4bit, attach_lora and use_lean_layers make. in_4bit: names of the linear layers in a decoder layer
    that are 4-bit. dtype: of the compute and of the weights that are not. attention: its name in transformers.
    Downloads nothing but the config of a model that ships no config here. Raises UserError as load_config and
    attach_lora do.
    """
    config = load_config(replace(spec, weights="random", layers=layers))
    double_quant = quantization_config(config, dtype).bnb_4bit_use_double_quant
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        name_of = {module: name for name, module in model.named_modules()}
        names = [f"{name_of[layer]}.{name}" for layer in decoder_layers(model) for name in in_4bit]
        make_linears_4bit(model, names, dtype, _FakeLinear4bit)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = spec.bits == 4
    fuse_head_and_loss(model)
    keep_frequencies(model)
    adapted = attach_lora(model, lora)
    with mode:
        _materialize(adapted, dtype, double_quant=double_quant)
    keep_dropout_masks_as_on_gpu(adapted)
    if kernels == "lean" and not unsupported_reason(adapted):
        swap_in_lean_classes(adapted)
    return adapted.train()


def keep_dropout_masks_as_on_gpu(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout):
            model.set_submodule(name, _MaskedDropout(module.p))


class _MaskedDropout(nn.Dropout):
    """Saves a mask of one byte an entry, as on a GPU. On a CPU torch saves its noise in the dtype of the input."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.native_dropout(inputs, self.p, self.training)[0]
        return output


class _FakeLinear4bit(Linear4bit):
    """A Linear4bit that gives DoRA its weight under the name W_q.

    For DoRA, PEFT 0.21 (dequantize_module_weight) copies the weight of a Linear4bit, which cannot be done on meta. A
    module that has W_q it asks to dequantize.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A weight that FSDP2 has gathered has no quant_state. Linear4bit would try to repair it.
        self.weight.quant_state = self.quant_state
        output: torch.Tensor = super().forward(x)
        return output

    @property
    def W_q(self) -> torch.Tensor:
        return self.weight

    def dequantize(self) -> torch.Tensor:
        state = self.quant_state
        return self.weight.data if state is None else bnb.dequantize_4bit(self.weight, state)


def _materialize(model: nn.Module, dtype: torch.dtype, *, double_quant: bool) -> None:
    """Replaces every meta tensor by a fake one. A 4-bit weight gets its packed form and its scales."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(module, Linear4bit) and name == "weight":
                module._parameters[name] = fake_4bit_weight(module, dtype, double_quant=double_quant)
                module.compute_type_is_set = True
            else:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)


def fake_4bit_weight(module: nn.Linear, dtype: torch.dtype, *, double_quant: bool) -> nn.Parameter:
    """An ordinary parameter with the quant_state of a Params4bit. A Params4bit cannot hold a fake tensor."""
    values = module.in_features * module.out_features
    blocks = -(-values // VALUES_PER_SCALE)
    outer = bnb.QuantState(
        absmax=torch.empty(-(-blocks // SCALES_PER_OUTER_SCALE)),
        code=torch.empty(256),
        blocksize=SCALES_PER_OUTER_SCALE,
        dtype=torch.float32,
    )
    weight = nn.Parameter(torch.empty((-(-values // 2), 1), dtype=torch.uint8), requires_grad=False)
    weight.quant_state = bnb.QuantState(  # type: ignore[attr-defined]
        absmax=torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=VALUES_PER_SCALE,
        quant_type=QUANT_TYPE,
        dtype=dtype,
        offset=torch.empty(()) if double_quant else None,
        state2=outer if double_quant else None,
    )
    module.quant_state = weight.quant_state  # type: ignore[attr-defined]
    return weight
