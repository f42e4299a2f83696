"""Adapters made elsewhere, with plain PEFT: they compute what PEFT computes, or they are refused by name."""

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.adapter.find import find_adapter
from common.adapter.gguf import write_adapter
from common.adapter.load import load_trained
from common.adapter.merge import MergedWeights, write_merged
from common.cli import run_command
from common.model.adapter_config import _OF_TRAINING, _SUPPORTED, _WHY_NOT, read_adapter_config
from common.model.config import load_config
from common.recipe import ModelSpec, Recipe, UserError
from recipes.tiny import RECIPE
from tests.conftest import TINY

IDS = torch.arange(5, 45)[None]


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def make(folder: Path, **values: Any) -> Recipe:
    """A recipe on models/tiny in 16 bits, and an adapter of noise in `out` that PEFT made with this LoraConfig."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | values
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of what some of these fields do
        model = get_peft_model(base_model(), LoraConfig(**config))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": RECIPE.model.name}))
    return replace(RECIPE, model=ModelSpec(RECIPE.model.name, bits=16), out=str(folder))


def logits_of_peft(recipe: Recipe) -> torch.Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base_model(), recipe.out).eval()(IDS).logits


SUPPORTED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 8, r"layers\.1\.self_attn\.v_proj": 2}},
    "alphas": {"alpha_pattern": {"v_proj": 32}},
    "rslora with ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    "a regex": {"target_modules": r".*layers\.[01]\.(mlp\.up_proj|self_attn\.k_proj)"},
    "all linear layers": {"target_modules": "all-linear"},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 0},
    "gaussian": {"init_lora_weights": "gaussian"},
    "noise": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "fan in, fan out": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("values", SUPPORTED.values(), ids=SUPPORTED)
def test_what_is_supported_computes_what_peft_computes(tmp_path, values):
    """Beside the base, and merged into it."""
    recipe = make(tmp_path / "adapter", **values)
    wanted = logits_of_peft(recipe)
    with torch.no_grad():
        of_base = base_model().eval()(IDS).logits
        adapter = find_adapter(recipe)
        ours = load_trained(adapter)(IDS).logits.float()
        (tmp_path / "merged").mkdir()
        write_merged(MergedWeights(adapter), tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()(IDS).logits
    assert torch.allclose(ours, wanted, atol=1e-3)
    assert divergence(wanted, merged) < 3e-5 < divergence(wanted, of_base) / 10  # the merged weights are bf16


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changed .* path_initial_model_for_weight"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changed the weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', which changed the weights of the base"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\], so the adapter is more than LoRA'),
        ({"trainable_token_indices": [5, 6]}, r"trainable_token_indices=\[5, 6\], so .* rows of the embedding"),
        (
            {"lora_bias": True},
            "lora_bias=true, so .* it has biases; where .* have them too, merge .*; else it cannot be merged",
        ),
        ({"bias": "all"}, 'bias="all", so the adapter is more than LoRA: it holds biases of the base'),
        ({"bias": "lora_only"}, 'bias="lora_only", so the adapter is more than LoRA'),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication=.* it repeats layers of the base"),
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens=\[3\], so .* cannot be merged: use it with PEFT"),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters=.* parameters outside linear layers"),
        (
            {"target_modules": ["embed_tokens", "q_proj"]},
            "changes model.embed_tokens .target_modules., and only linear",
        ),
        ({"target_modules": ["lm_head", "q_proj"]}, "changes lm_head .target_modules., and only linear layers"),
        ({"task_type": "FEATURE_EXTRACTION"}, "a model for FEATURE_EXTRACTION, not for CAUSAL_LM"),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name_with_the_remedy(tmp_path, capsys, values, message):
    """By each command that would read it, and before anything is written."""
    recipe = make(tmp_path / "adapter", **values)
    with pytest.raises(UserError, match=message) as refused:
        load_trained(find_adapter(recipe))
    assert "\n" not in str(refused.value)
    to = ["--to", str(tmp_path / "made")]
    for command, flags in (
        ("chat", ["--prompt", "Hi"]),
        ("merge", to),
        ("export", to),
        ("export", [*to, "--format", "lora"]),
    ):
        assert run_command(command, "tiny", recipe, flags) == 2
        assert str(refused.value) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make(folder)
    return folder / "adapter_config.json"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda', which changed .* path_initial_model"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga', which changed"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq', which may have changed"),
        ({"init_lora_weights": "one of tomorrow"}, "init_lora_weights='one of tomorrow', which may have changed"),
        ({"init_lora_weights": 1}, "init_lora_weights=1, which may have changed"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config=.* it changes the base; merge it with PEFT"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.* cut into blocks"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config=.* noise of its own"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config=.* chosen for each token"),
        ({"use_qalora": True}, "use_qalora=true, .* GPTQ"),
        ({"megatron_config": {"x": 1}}, "megatron_config=.* Megatron"),
        ({"use_lora_of_tomorrow": True}, "use_lora_of_tomorrow=true, a field that is not known here"),
        ({"tomorrow": "x" * 100}, "tomorrow=.*…, a field that is not known here and may change what the adapter means"),
        ({"tomorrow": 0}, "tomorrow=0, a field that is not known here"),
        ({"peft_type": "ADALORA"}, "an adapter of the type ADALORA, which is not LoRA; merge it with PEFT"),
        ({"peft_type": "XLORA"}, "an adapter of the type XLORA"),
        ({"r": True}, "is not the configuration of an adapter: r is True"),
        ({"use_dora": "true"}, "is not the configuration of an adapter: use_dora is 'true'"),
        ({"rank_pattern": ["q_proj"]}, "is not the configuration of an adapter: rank_pattern is"),
    ],
)
def test_what_a_file_says_is_known_or_refused(plain, tmp_path, values, message):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(plain.read_text()) | values))
    with pytest.raises(UserError, match=message):
        read_adapter_config(path)


@pytest.mark.parametrize(
    "values",
    [
        {"tomorrow": None, "use_tomorrow": False, "tomorrows": [], "of_tomorrow": {}},
        {"peft_version": "9.9", "qalora_group_size": 32, "megatron_core": "x", "inference_mode": False},
        {"init_lora_weights": True, "corda_config": {"corda_method": "kpm"}},  # as PEFT's conversion leaves it
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"rank_pattern": None, "alpha_pattern": None},
    ],
)
def test_what_says_nothing_of_a_trained_adapter_is_no_matter(plain, tmp_path, values):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(plain.read_text()) | values))
    assert read_adapter_config(path) == read_adapter_config(plain)


def test_every_field_of_peft_is_in_one_of_the_lists():
    known = [*_SUPPORTED, *_OF_TRAINING, *_WHY_NOT, "peft_type", "task_type", "init_lora_weights"]
    assert sorted(known) == sorted(field.name for field in fields(LoraConfig))


def test_pissa_that_peft_converted_is_what_peft_trained(tmp_path):
    """The remedy that is named: the difference to the initial adapter, as LoRA of twice the rank on the base itself."""
    base = base_model()
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of two adapters while it subtracts one from the other
        model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": RECIPE.model.name}))
    recipe = replace(RECIPE, model=ModelSpec(RECIPE.model.name, bits=16), out=str(tmp_path / "lora"))
    with torch.no_grad():
        assert torch.allclose(load_trained(find_adapter(recipe))(IDS).logits, wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"base_model.model.model.embed_tokens.weight": torch.ones(3, 2)}, "embed_tokens.weight as well"),
        (lambda w: dict(list(w.items())[1:]), "is not there, and the base needs"),
        (lambda w: {name.removeprefix("base_model.model."): t for name, t in w.items()}, "does not fit"),
        (lambda w: {name.replace(".weight", ".default.weight"): t for name, t in w.items()}, "does not fit"),
        (lambda w: w | {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 2)}, "does not fit"),
    ],
    ids=["an embedding", "one missing", "another prefix", "the name of the adapter", "one more"],
)
def test_tensors_that_do_not_belong_are_named(tmp_path, change, message):
    recipe = make(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)
    adapter = find_adapter(recipe)
    with pytest.raises(UserError, match=message):
        load_trained(adapter)
    with pytest.raises(UserError, match=message):
        write_adapter(adapter, load_config(recipe.model), tmp_path / "x.gguf", "x")


def test_a_pickled_adapter_is_refused_with_the_way_to_safetensors(tmp_path):
    recipe = make(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="in adapter_model.bin, a pickle, which may run code and is not read: load the"):
        find_adapter(recipe)


def test_an_adapter_of_another_revision_of_the_base_is_refused(tmp_path):
    recipe = make(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "abc"}))
    with pytest.raises(UserError, match="on the revision abc of .* the recipe says main: set ModelSpec.revision"):
        find_adapter(recipe)
    assert find_adapter(replace(recipe, model=replace(recipe.model, revision="abc")))
