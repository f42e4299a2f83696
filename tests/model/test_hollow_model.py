import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from common.machine.layout import Layout
from common.model.activation_checkpointing import decoder_layers
from common.model.hollow_model import fill_layer, take_layer_weights
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.recipe import LoraSpec, ModelSpec, UserError
from tests.conftest import TINY

TWO = Layout(2, sharded=True)


def test_pitfall_23_4_bit_weights_are_stored_in_the_dtype_of_the_model(small_llama):
    """FSDP2 shards parameters of one floating dtype; bitsandbytes stores bytes by default."""
    model = attach_lora(load_4bit(ModelSpec(str(small_llama)), layout=TWO), LoraSpec(4, 4))
    layer = decoder_layers(model)[0]
    fill_layer(layer, "model.layers.0", take_layer_weights(model.get_base_model()))
    linears = [module for module in layer.modules() if isinstance(module, Linear4bit)]
    assert len(linears) == 7
    assert {module.weight.dtype for module in linears} == {torch.float32}  # of the compute on a CPU


@pytest.fixture(params=["4 bit", "16 bit", "stored in 4 bit", "random", "tied", "gemma"])
def spec(request, small_llama, small_model, tmp_path) -> ModelSpec:
    """A model of each kind that can be loaded."""
    match request.param:
        case "16 bit":
            return ModelSpec(str(small_llama), bits=16)
        case "stored in 4 bit":
            load_4bit(ModelSpec(str(small_llama))).save_pretrained(tmp_path)
        case "random":
            return ModelSpec(str(TINY), weights="random", layers=2)
        case "tied":
            return ModelSpec(str(small_model("qwen2", tie_word_embeddings=True)))
        case "gemma":  # a buffer beside the weights: its embedding's scale
            return ModelSpec(str(small_model("gemma3_text")))
        case _:
            return ModelSpec(str(small_llama))
    return ModelSpec(str(tmp_path))


def test_a_filled_layer_is_what_load_4bit_loads(spec):
    ordinary = attach_lora(load_4bit(spec), LoraSpec(4, 4), seed=3)
    hollow = attach_lora(load_4bit(spec, layout=TWO), LoraSpec(4, 4), seed=3)
    use_lean_layers(ordinary, "lean")
    use_lean_layers(hollow, "lean")
    weights = take_layer_weights(hollow.get_base_model())
    for index, layer in enumerate(decoder_layers(hollow)):
        fill_layer(layer, f"model.layers.{index}", weights)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        expected, given = (model.eval()(input_ids=ids, labels=ids).loss for model in (ordinary, hollow))
    assert given == expected
    assert hollow.generation_config.eos_token_id == ordinary.generation_config.eos_token_id
    for (name, one), (other_name, other) in zip(ordinary.named_parameters(), hollow.named_parameters(), strict=True):
        assert name == other_name
        assert one.requires_grad == other.requires_grad
        assert not one.requires_grad or torch.equal(one, other)  # the very adapters that a run on one card begins with


def test_a_model_that_is_not_hollow_has_no_weights_to_take(small_llama):
    with pytest.raises(UserError, match="the recipe has loaded them whole: write load_4bit"):
        take_layer_weights(load_4bit(ModelSpec(str(small_llama))))


def test_a_hollow_model_takes_the_memory_of_what_is_outside_its_layers(small_llama):
    model = load_4bit(ModelSpec(str(small_llama)), layout=TWO)
    for layer in decoder_layers(model):
        assert sum(parameter.untyped_storage().nbytes() for parameter in layer.parameters()) < 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 128}, r"does not fit its config.json: .*embed_tokens.weight is \(\d+, 64\), the config says"),
        ({"num_hidden_layers": 9}, r"is incomplete: model.layers.\d.* is missing"),
        ({"intermediate_size": 256}, r"does not fit its config.json: model.layers.0.mlp.gate_proj.weight is"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(small_model, values, message):
    folder = small_model("llama")
    config = json.loads((folder / "config.json").read_text())
    layer_types = {"layer_types": None} if "layer_types" in config else {}
    (folder / "config.json").write_text(json.dumps(config | values | layer_types))
    with pytest.raises(UserError, match=message):
        model = load_4bit(ModelSpec(str(folder)), layout=TWO)
        weights = take_layer_weights(model)
        for index, layer in enumerate(decoder_layers(model)):
            fill_layer(layer, f"model.layers.{index}", weights)
