"""One set of NF4 settings: what each function makes is what transformers makes of the same weights."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

from common.model.config import load_config
from common.model.loading import load_4bit
from common.model.nf4 import (
    SCALES_PER_OUTER_SCALE,
    VALUES_PER_SCALE,
    dequantize,
    make_linears_4bit,
    names_of_4bit_linears,
    quantize,
    read_4bit,
    state_from_tensors,
    state_tensors,
)
from common.model.safetensors_files import SafetensorsFolder
from common.recipe import ModelSpec
from tests.conftest import ARCHITECTURES, FP32


def meta_model(folder):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(ModelSpec(str(folder))), dtype=torch.float32)


def linears_of(model) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_4_bit_layers_are_those_that_from_pretrained_quantizes(small_model, architecture):
    folder = small_model(architecture)
    expected = linears_of(load_4bit(ModelSpec(str(folder)), FP32))
    model = meta_model(folder)
    assert names_of_4bit_linears(model) == list(expected)
    make_linears_4bit(model, names_of_4bit_linears(model), torch.float32)
    assert list(linears_of(model)) == list(expected)


def test_a_quantized_weight_is_the_one_that_from_pretrained_makes(small_llama):
    stored = SafetensorsFolder(small_llama)
    for name, module in linears_of(load_4bit(ModelSpec(str(small_llama)), FP32)).items():
        packed, state = quantize(stored.read(f"{name}.weight").float())
        assert torch.equal(packed, module.weight.data)
        assert torch.equal(dequantize(packed, state), dequantize(module.weight.data, module.weight.quant_state))
        assert (state.blocksize, state.state2.blocksize) == (VALUES_PER_SCALE, SCALES_PER_OUTER_SCALE)


def test_scales_survive_the_way_through_plain_tensors():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    packed, state = quantize(weight)
    again = state_from_tensors(state_tensors(state))
    assert torch.equal(dequantize(packed, again), dequantize(packed, state))


def test_a_weight_that_is_stored_in_4_bits_is_read_as_it_was_saved(small_llama, tmp_path):
    model = load_4bit(ModelSpec(str(small_llama)), FP32)
    model.save_pretrained(tmp_path)
    stored = SafetensorsFolder(tmp_path)
    for name, module in linears_of(model).items():
        packed, state = read_4bit(stored, f"{name}.weight", torch.device("cpu"), torch.float32)
        assert torch.equal(dequantize(packed, state), dequantize(module.weight.data, module.weight.quant_state))
