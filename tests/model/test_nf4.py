"""One set of NF4 settings: what each function makes is what transformers makes of the same weights."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

from common.kernels.nf4_dequantize import SCALES_PER_OUTER_SCALE, VALUES_PER_SCALE
from common.machine.device import Machine
from common.model.config import load_config
from common.model.loading import load_4bit
from common.model.nf4 import (
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


# arXiv:2305.14314, appendix E: the 16 values of NF4, by code
CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def dequantize_in_float64(packed: torch.Tensor, state: object) -> torch.Tensor:
    """From the raw bytes: the first value of a byte is its upper half; a scale is one of 256 codes, and an offset."""
    raw = packed.view(torch.uint8).flatten()
    values = torch.tensor(CODES, dtype=torch.float64)[torch.stack([raw >> 4, raw & 15], 1).flatten().long()]
    scales = state.absmax.double()
    if state.nested:
        outer = state.state2.absmax.double().repeat_interleave(SCALES_PER_OUTER_SCALE)[: len(scales)]
        scales = state.state2.code.double()[state.absmax.long()] * outer + state.offset.double()
    count = state.shape.numel()
    return (values[:count] * scales.repeat_interleave(VALUES_PER_SCALE)[:count]).view(state.shape)


@pytest.mark.parametrize("shape", [(64, 64), (576, 192), (3, 5), (7, 33), (1, 66), (130, 100)], ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantised_weights_are_those_of_the_raw_codes_in_float64(dtype, nested, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = quantize(weight, double_quant=nested)
    expected = dequantize_in_float64(packed, state)
    found = dequantize(packed, state)
    assert found.dtype == dtype and found.shape == shape
    # Two roundings, to fp32 within and to the dtype at last.
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    # Half of the widest gap between two codes, 0.304, times the largest scale; double quantisation costs a bit of it.
    assert (found.double() - weight.double()).abs().max() < 0.2 * weight.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_loaded_weight_dequantises_to_the_raw_codes_in_every_dtype_of_the_compute(small_llama, dtype):
    machine = Machine(torch.device("cpu"), dtype, "a test", "CPU")
    for module in linears_of(load_4bit(ModelSpec(str(small_llama)), machine)).values():
        packed, state = module.weight.data, module.weight.quant_state
        found = dequantize(packed, state)
        assert found.dtype == dtype
        expected = dequantize_in_float64(packed, state)
        torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
