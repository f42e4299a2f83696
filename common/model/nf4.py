"""NF4 (arXiv:2305.14314 section 3): its settings, which layers have it, and the forms in which weights carry it.

bitsandbytes quantizes and stores the weights. A quantized weight is a tensor of packed bytes, two values each, and a
`QuantState` with its scales. Everything that loads, packs, merges or counts 4-bit weights takes the settings from here.
"""

from collections.abc import Iterable

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from common.model.quantization import QUANT_TYPE, SETTINGS, stored_quantization
from common.model.safetensors_files import SafetensorsFolder

# What transformers' name of a stored 4-bit weight is followed by in the tensor that holds its settings.
STORED_SETTINGS = SETTINGS + QUANT_TYPE
# The tensors of a QuantState, in the order of `state_tensors`; the last two exist only with double quantization.
STATE_KEYS = (STORED_SETTINGS[1:], "absmax", "quant_map", "nested_absmax", "nested_quant_map")


def quantization_config(config: PretrainedConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How a model of this config is quantized: as a 4-bit checkpoint is; any other in NF4 with double quantization.

    dtype: of the compute. transformers' from_pretrained takes it to quantize weights as it reads them.
    """
    stored = stored_quantization(config)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=QUANT_TYPE,
        bnb_4bit_use_double_quant=stored is None or stored.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=None if stored is None else stored.llm_int8_skip_modules,
    )


def quantize(weight: Tensor, *, double_quant: bool = True) -> tuple[Tensor, bnb.QuantState]:
    """A 16- or 32-bit weight as packed bytes, uint8 (values / 2, 1), and its scales: as from_pretrained makes them."""
    packed, state = bnb.quantize_4bit(weight, compress_statistics=double_quant, quant_type=QUANT_TYPE)
    return packed, state


def dequantize(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """The weight (out, in) that the compute sees, in the dtype that it was quantized from."""
    weight: Tensor = bnb.dequantize_4bit(packed, state)
    return weight


def names_of_4bit_linears(model: PreTrainedModel) -> list[str]:
    """Names of the layers that are 4-bit when a base model is loaded in 4 bits.

    Of a 4-bit checkpoint they are those that its config does not skip; of any other all linear layers but the head.
    transformers' own functions choose them, as in its replace_with_bnb_linear. model: before its layers are replaced.
    """
    stored = stored_quantization(model.config)
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, None if stored is None else stored.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, skipped)
    ]


def make_linears_4bit(
    model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype, kind: type[Linear4bit] = Linear4bit
) -> None:
    """Replaces linear layers of a model on meta by 4-bit ones, as transformers does when it loads. dtype: of the
    compute, and of the tensor that the packed bytes are stored in."""
    for name in names:
        old = model.get_submodule(name)
        shape = (old.in_features, old.out_features, old.bias is not None)
        model.set_submodule(name, kind(*shape, compute_dtype=dtype, quant_type=QUANT_TYPE, quant_storage=dtype))


def keep_packed_form(module: Linear4bit) -> None:
    """Stops bitsandbytes 0.50 from repacking the weight for inference.

    It does so in eval mode on a CPU with AVX512-BF16, and rounds the scales to bf16 on the way. The repacked form has
    no backward.
    """
    module.support_avx512bf16_for_cpu = False


def state_tensors(state: bnb.QuantState) -> list[Tensor]:
    """A weight's scales as plain tensors, which can be sent to other processes; `state_from_tensors` is the inverse."""
    parts = state.as_dict(packed=True)
    return [parts[key] for key in STATE_KEYS if key in parts]


def state_from_tensors(tensors: list[Tensor]) -> bnb.QuantState:
    values = dict(zip(STATE_KEYS, tensors, strict=False))  # without double quantization the last two are missing
    values[STATE_KEYS[0]] = values[STATE_KEYS[0]].cpu()
    return bnb.QuantState.from_dict(values, device=tensors[1].device)


def read_4bit(
    stored: SafetensorsFolder, name: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, bnb.QuantState]:
    """A weight that a folder stores in 4 bits: its packed bytes, and its scales. dtype: that it dequantizes to."""
    parts = {
        key.removeprefix(f"{name}."): stored.read(key).to(device)
        for key in stored.entries
        if key.startswith(f"{name}.")
    }
    state = bnb.QuantState.from_dict(parts, device=device)
    state.dtype = dtype
    return stored.read(name).to(device), state
