"""4-bit checkpoints in every form that bitsandbytes stores: loaded as they are stored, or refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM

from common.machine.layout import Layout
from common.model.activation_checkpointing import decoder_layers
from common.model.config import load_config
from common.model.hollow_model import fill_layer, take_layer_weights
from common.model.loading import load_4bit
from common.recipe import ModelSpec, UserError
from tests.conftest import FP32, MIXED, NESTED, TINY

IDS = torch.arange(10, 60)[None]
FORMS = {
    "double quantization": NESTED,
    "plain scales": NESTED | {"bnb_4bit_use_double_quant": False},
    **{f"packed in {dtype}": NESTED | {"bnb_4bit_quant_storage": dtype} for dtype in ("bfloat16", "float32", "int8")},
    "some layers in 16 bits": MIXED,
    "o_proj in 16 bits everywhere": NESTED | {"llm_int8_skip_modules": ("lm_head", "o_proj")},
    "a pattern": NESTED | {"llm_int8_skip_modules": ("lm_head", r"model\.layers\.[13]\.self_attn")},
    "computes in bf16": NESTED | {"bnb_4bit_compute_dtype": "bfloat16"},
}


def load_sharded(spec: ModelSpec) -> Any:
    """What the cards of a sharded run hold together, before it is sharded."""
    model = load_4bit(spec, FP32, layout=Layout(2, sharded=True))
    weights = take_layer_weights(model)
    for index, layer in enumerate(decoder_layers(model)):
        fill_layer(layer, f"model.layers.{index}", weights)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def names_in_4_bits(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_process_and_several_load_what_transformers_loads(four_bit, form):
    folder = four_bit(**form)
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in alone.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32  # ours is the machine's, whatever the checkpoint says
            module.support_avx512bf16_for_cpu = False  # else bitsandbytes rounds: common.model.nf4.keep_packed_form
    for model in (load_4bit(ModelSpec(str(folder)), FP32), load_sharded(ModelSpec(str(folder)))):
        assert names_in_4_bits(model) == names_in_4_bits(alone)
        assert torch.equal(logits(model), logits(alone))


def test_a_mixed_checkpoint_is_another_model_than_one_with_all_layers_in_4_bits(four_bit):
    """Without this the test above would not see a layer that is quantized further."""
    mixed, whole = (load_4bit(ModelSpec(str(four_bit(**form))), FP32) for form in (MIXED, NESTED))
    assert len(names_in_4_bits(whole)) == 28 and len(names_in_4_bits(mixed)) == 28 - 3 - 1
    assert (logits(mixed) - logits(whole)).abs().max() > 1e-3


def test_what_is_not_4_bit_has_the_dtype_of_the_compute_whatever_is_stored(four_bit):
    """transformers leaves embedding, head and norms of a 4-bit checkpoint as they are stored."""
    spec = ModelSpec(str(four_bit(torch.bfloat16, **MIXED)))
    one, several = load_4bit(spec, FP32), load_sharded(spec)
    for model in (one, several):
        in_16 = {p.dtype for p in model.parameters() if not isinstance(p, Params4bit) and p.shape[-1] > 1}
        assert in_16 == {torch.float32}
    assert torch.equal(logits(one), logits(several))


@pytest.mark.parametrize("form", [MIXED, NESTED | {"bnb_4bit_use_double_quant": False}], ids=["mixed", "plain scales"])
def test_random_weights_are_quantized_as_the_checkpoint_is(four_bit, form):
    folder = str(four_bit(**form))
    stored, spec = load_4bit(ModelSpec(folder), FP32), ModelSpec(folder, weights="random")
    one, several = load_4bit(spec, FP32), load_sharded(spec)
    assert names_in_4_bits(one) == names_in_4_bits(several) == names_in_4_bits(stored)
    assert torch.equal(logits(one), logits(several))
    for model in (one, several):
        states = [module.quant_state for module in model.modules() if isinstance(module, Linear4bit)]
        assert {state.nested for state in states} == {form["bnb_4bit_use_double_quant"]}


def write_config(folder: Path, quantization: object) -> Path:
    """A folder that has only the config of models/tiny, as a model that is not downloaded yet."""
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (BNB | {"bnb_4bit_quant_type": "fp4"}, "is quantised in fp4; take an nf4 checkpoint, or the original"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantised in fp4"),  # bitsandbytes' default
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "is quantised with bitsandbytes in 8 bits; take the"),
        (BNB | {"llm_int8_skip_modules": ["model.layers.0.mlp"]}, r"has its head \(lm_head\) in 4 bits"),
        (BNB | {"llm_int8_skip_modules": []}, r"has its head \(lm_head\) in 4 bits"),
        (BNB | {"llm_int8_skip_modules": "lm_head"}, "cannot be read: llm_int8_skip_modules must be a list"),
        (BNB | {"llm_int8_skip_modules": ["*.mlp"]}, "cannot be read: nothing to repeat"),
        (BNB | {"bnb_4bit_compute_dtype": "float31"}, "cannot be read: module 'torch' has no attribute 'float31'"),
        (BNB | {"load_in_8bit": True}, "cannot be read: load_in_4bit and load_in_8bit are both True"),
        ({"quant_method": "awq", "bits": 4}, "is quantised with awq; take the original"),
        ({}, "is quantised with an unknown method"),
        (["nf4"], "is quantised with an unknown method"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_config_alone(tmp_path, quantization, message):
    with pytest.raises(UserError, match=message):
        load_config(ModelSpec(str(write_config(tmp_path, quantization))))


def test_16_bits_of_a_4_bit_checkpoint_are_refused(tmp_path):
    folder = str(write_config(tmp_path, BNB))
    assert load_config(ModelSpec(folder)).quantization_config == BNB
    with pytest.raises(UserError, match=r"ModelSpec.bits is 16, and .* is stored in 4; take bits=4, or the original"):
        load_config(ModelSpec(folder, bits=16))


@pytest.fixture
def edited(four_bit, tmp_path) -> Callable[..., str]:
    """edited(form, weights, **values): a checkpoint whose config.json says something else than its files hold."""

    def make(form: dict[str, Any], weights: Path | None = None, **values: object) -> str:
        folder = tmp_path / "edited"
        shutil.copytree(four_bit(**form), folder)
        if weights is not None:
            shutil.copy(weights / "model.safetensors", folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(values)
        if values == {"load_in_4bit": None}:
            del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("form", "values", "said"),
    [
        (MIXED, {"llm_int8_skip_modules": None}, "model.layers.0.mlp.down_proj.weight is stored in 16 bits"),
        # transformers 4 looked for these names anywhere, transformers 5 looks at the beginning and the end.
        (MIXED, {"llm_int8_skip_modules": ["lm_head", "layers.0.mlp"]}, "is stored in 16 bits"),
        (NESTED, {"llm_int8_skip_modules": ["lm_head", "k_proj"]}, "self_attn.k_proj.weight is stored in 4 bits"),
        (MIXED, {"load_in_4bit": None}, "is stored in 4 bits"),
        (FORMS["plain scales"], {"bnb_4bit_use_double_quant": True}, "are stored without double quantization"),
    ],
)
def test_where_config_and_files_differ_the_files_decide_and_it_is_said(four_bit, edited, capsys, form, values, said):
    expected = logits(load_4bit(ModelSpec(str(four_bit(**form))), FP32))
    assert capsys.readouterr().out == ""
    spec = ModelSpec(edited(form, **values))
    assert torch.equal(logits(load_4bit(spec, FP32)), expected)
    out = capsys.readouterr().out
    assert out.startswith(f"warning: {spec.name} is not as its config.json says: ") and said in out
    assert torch.equal(logits(load_sharded(spec)), expected)


def test_a_config_that_was_left_behind_by_a_4_bit_model_is_said_too(edited, capsys):
    spec = ModelSpec(edited(NESTED, weights=TINY))
    expected = logits(load_4bit(ModelSpec(str(TINY)), FP32))
    assert torch.equal(logits(load_4bit(spec, FP32)), expected)
    assert "is stored in 16 bits. What its files hold is what loads" in capsys.readouterr().out
    assert torch.equal(logits(load_sharded(spec)), expected)


@pytest.mark.parametrize(
    ("form", "values", "bits", "message"),
    [
        (NESTED | {"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_quant_type": "nf4"}, 4, "is quantised in fp4"),
        (
            NESTED | {"llm_int8_skip_modules": ("o_proj",)},
            {"llm_int8_skip_modules": ["lm_head", "o_proj"]},
            4,
            r"has its head \(lm_head\) in 4 bits",
        ),
        (NESTED, {"load_in_4bit": None}, 16, "ModelSpec.bits is 16"),
    ],
)
def test_files_that_cannot_be_trained_are_refused_whatever_the_config_says(edited, form, values, bits, message):
    spec = ModelSpec(edited(form, **values), bits=bits)
    for load in (lambda: load_4bit(spec, FP32), lambda: load_sharded(spec)):
        with pytest.raises(UserError, match=message):
            load()
