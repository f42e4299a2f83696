"""A layer at a time is what load_4bit loads at once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from common.model.config import load_config
from common.model.layer_loader import LayerLoader
from common.model.loading import load_4bit
from common.recipe import ModelSpec, UserError
from tests.conftest import FP32

BF16 = replace(FP32, dtype=torch.bfloat16)


def partly_4bit(small_llama: Path, folder: Path) -> ModelSpec:
    """A checkpoint that stores some layers in 4 bits and some in 16."""
    skipped = ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn"]
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skipped
    )
    LlamaForCausalLM.from_pretrained(
        small_llama, quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    ).save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["llm_int8_skip_modules"] == skipped
    return ModelSpec(str(folder))


@pytest.fixture(params=["4 bit", "16 bit", "stored in 4 bit", "stored in 4 bit, partly", "tied, in several files"])
def spec(request, small_llama, small_model, tmp_path) -> ModelSpec:
    match request.param:
        case "16 bit":
            return ModelSpec(str(small_llama), bits=16)
        case "stored in 4 bit":
            load_4bit(ModelSpec(str(small_llama)), BF16).save_pretrained(tmp_path)
            return ModelSpec(str(tmp_path))
        case "stored in 4 bit, partly":
            return partly_4bit(small_llama, tmp_path)
        case "tied, in several files":
            return ModelSpec(str(small_model("qwen3", max_shard_size="100KB", tie_word_embeddings=True)))
        case _:
            return ModelSpec(str(small_llama))


@pytest.mark.parametrize("machine", [FP32, BF16], ids=["fp32", "bf16"])
def test_each_tensor_is_the_one_that_load_4bit_computes_with(spec, machine):
    layers = LayerLoader(spec, load_config(spec, Path(spec.name)), Path(spec.name), machine)
    whole, in_4_bits = load_4bit(spec, machine), 0
    for name, value in whole.named_parameters():
        is_4bit = isinstance(whole.get_submodule(name.rpartition(".")[0]), Linear4bit)
        expected = bnb.dequantize_4bit(value.data, value.quant_state) if is_4bit else value
        assert torch.equal(layers.read(name), expected.to(machine.dtype).float()), name
        assert layers.is_4bit(name) == is_4bit
        in_4_bits += is_4bit
    assert (in_4_bits == 0) == (spec.bits == 16)


def test_rows_are_read_as_they_are_asked_for(small_llama):
    spec = ModelSpec(str(small_llama))
    layers = LayerLoader(spec, load_config(spec, small_llama), small_llama, FP32)
    whole = layers.read("lm_head.weight")
    assert torch.equal(layers.read("lm_head.weight", [7, 2, 7]), whole[[7, 2, 7]])
    assert torch.equal(layers.read("lm_head.weight", slice(1000, 2000)), whole[1000:])  # there are 1024
    assert layers.read_stored("lm_head.weight").dtype == torch.bfloat16
    with pytest.raises(UserError, match="is incomplete: model.layers.0.x is missing"):
        layers.read_stored("model.layers.0.x")
