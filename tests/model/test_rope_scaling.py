"""A scaled RoPE is that of a stock transformers model with the same config, at positions beyond the model's own."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.model import attention
from common.model import lean_layers as modules
from common.model.activation_checkpointing import Policy
from common.model.config import load_config, refuse_more_positions
from common.model.loading import load_4bit
from common.model.rope_scaling import usable_positions, with_rope_scaling
from common.plan.fake_model import fake_lora_model
from common.recipe import LoraSpec, ModelSpec, UserError
from tests.conftest import ARCHITECTURES, FP32
from tests.model.test_lean_layers import WAYS, adapted, of_packed_row
from tests.plan.planners import RECIPE
from tests.test_rope_scaling import LINEAR

OWN = 32  # positions of the small models here; rows have up to 60 tokens an example, and 128 in all
KINDS = {
    "linear": LINEAR | {"factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 24},
    "yarn, all of it": {
        "rope_type": "yarn",
        "factor": 5.5,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.7,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
        "rope_theta": 50_000.0,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 6.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 7.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
POSITIONS = {"linear": 128, "yarn": 192, "yarn, all of it": 176, "yarn with mscale": 192, "llama3": 224}
IDS = torch.randint(5, 1000, (2, 120), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def folders(small_model):
    """Of each architecture two folders, the config.json in transformers 5's form and in that of version 4."""

    def make(name):
        folder = small_model(name, num_hidden_layers=3, max_position_embeddings=OWN)
        old = small_model(name, num_hidden_layers=3, max_position_embeddings=OWN)
        path = old / "config.json"
        values = json.loads(path.read_text())
        rope = values.pop("rope_parameters")
        if "full_attention" in rope:
            values |= {"rope_theta": rope["full_attention"]["rope_theta"], "rope_scaling": None}
            values["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        else:
            values |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
        path.write_text(json.dumps(values))
        return folder, old

    return {name: make(name) for name in ARCHITECTURES}


def by_hand(folder: Path, kind: str):
    """A config that transformers reads from no file of ours: its own class, given RoPE and positions."""
    config = AutoConfig.from_pretrained(folder)
    rope = {"rope_theta": 1e6 if "full_attention" in config.rope_parameters else 10_000.0} | KINDS[kind]
    if "full_attention" in config.rope_parameters:
        rope = config.rope_parameters | {"full_attention": rope}
    values = config.to_dict() | {"rope_parameters": rope, "max_position_embeddings": POSITIONS[kind]}
    return type(config)(**copy.deepcopy(values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_beyond_the_models_own_positions_are_those_of_stock_transformers(folders, architecture, kind):
    for folder in folders[architecture]:
        spec = ModelSpec(str(folder), bits=16, rope_scaling=KINDS[kind])
        if architecture == "gemma3_text" and "truncate" in KINDS[kind]:
            with pytest.raises(UserError, match="has truncate, which transformers does not read"):
                load_4bit(spec, FP32)
            continue
        model, config = load_4bit(spec, FP32), by_hand(folder, kind)
        stock = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, stock(IDS).logits)
            unscaled = load_4bit(ModelSpec(str(folder), bits=16), FP32)(IDS).logits
        assert (unscaled - stock(IDS).logits).abs().max() > 1e-2
        assert model.config.max_position_embeddings == usable_positions(model.config) == POSITIONS[kind]
        layers = {"layer_type": "full_attention"} if architecture == "gemma3_text" else {}
        frequencies, _ = ROPE_INIT_FUNCTIONS[KINDS[kind]["rope_type"]](config, **layers)
        name = "full_attention_inv_freq" if layers else "inv_freq"
        assert torch.equal(getattr(model.model.rotary_emb, name), frequencies)


def scaled(folder, kind, kernels):
    """A model with an adapter of noise, 16 bits, as tests.model.test_lean_layers.adapted makes it."""
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(with_rope_scaling(json.loads(before), ModelSpec("x", rope_scaling=KINDS[kind]))))
    try:
        return adapted(folder, kernels, bits=16)
    finally:
        path.write_text(before)


@pytest.mark.parametrize("kind", ["yarn, all of it", "llama3"])  # one scales cosines and sines too
@pytest.mark.parametrize("architecture", modules.TILED_MODEL_TYPES)
def test_lean_layers_and_tiles_give_the_gradients_of_the_stock_layers(folders, architecture, kind):
    """Float64, a packed row whose examples have up to 60 tokens, the model's own positions 32."""
    folder = folders[architecture][0]
    stock = scaled(folder, kind, "stock").double()
    stock.get_base_model().model.rotary_emb.float()  # transformers computes it in fp32 whatever the model's dtype
    expected = of_packed_row(stock, Policy(3, 3))
    plain = of_packed_row(adapted(folder, "stock", bits=16), Policy(3, 3))
    assert abs(plain[0] - expected[0]) > 1e-4  # the scaling does something
    for way in ("every layer", "tiles", "by head, offload"):
        model = scaled(folder, kind, "lean")
        model.set_attn_implementation(attention.PACKED_ATTENTION)
        loss, gradients = of_packed_row(model, WAYS[way])
        assert loss == pytest.approx(expected[0], rel=1e-6), way
        for name, gradient in expected[1].items():
            assert (gradients[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), (way, name)


def recipe_of(name: str, seq_len: int, **scaling):
    model = ModelSpec(name, rope_scaling=scaling or None)
    return replace(RECIPE, model=model, train=replace(RECIPE.train, seq_len=seq_len))


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.3", 32_768),
        ("Qwen/Qwen3-14B", 40_960),
        ("meta-llama/Llama-3.1-8B-Instruct", 131_072),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8192),
    ],
)
def test_rows_are_as_long_as_the_models_positions_and_the_scaling_that_is_named_gives_the_rest(name, positions):
    refuse_more_positions(recipe_of(name, positions))
    for seq_len in (positions + 1, 3 * positions + 7):
        with pytest.raises(
            UserError, match=f"seq_len is {seq_len:,}; {name} has {positions:,} positions. For longer r"
        ) as e:
            refuse_more_positions(recipe_of(name, seq_len))
        said = re.search(r"ModelSpec\(rope_scaling=(\{.*\})\) gives ([\d,]+) ", str(e.value))
        scaled = recipe_of(name, seq_len, **eval(said[1]))
        refuse_more_positions(scaled)
        assert usable_positions(load_config(scaled.model)) == int(said[2].replace(",", ""))


def test_qwen_reaches_what_its_documentation_says_with_the_values_that_stand_there():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    refuse_more_positions(recipe_of("Qwen/Qwen3-14B", 131_072, **yarn))
    with pytest.raises(UserError, match="Qwen/Qwen3-14B has 131,072 positions"):
        refuse_more_positions(recipe_of("Qwen/Qwen3-14B", 131_073, **yarn))


def edited(folder: Path, to: Path, **values) -> str:
    to.mkdir()
    config = json.loads((folder / "config.json").read_text()) | values
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


def test_a_scaling_that_does_not_fit_the_model_is_refused(small_llama, small_model, tmp_path):
    """The small Llama has 512 positions."""
    for scaling, message in (
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, "is 1,024; .* has 512 posit"),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            r"gives 512 positions \(factor 4 × 128\), and .* has 512 without it: leave it out",
        ),
    ):
        with pytest.raises(UserError, match=f"^ModelSpec.rope_scaling:? ?.*{message}"):
            load_config(ModelSpec(str(small_llama), rope_scaling=scaling))
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    own = edited(small_llama, tmp_path / "linear", rope_parameters=linear)  # 128 positions before that
    with pytest.raises(UserError, match="gives 512 positions"):
        load_config(ModelSpec(own, rope_scaling=LINEAR | {"factor": 4.0}))
    assert load_config(ModelSpec(own, rope_scaling=LINEAR | {"factor": 8.0})).max_position_embeddings == 1024


def test_a_config_that_was_edited_as_qwens_documentation_says_has_the_positions_that_it_means(small_llama, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    own = edited(small_llama, tmp_path / "yarn", rope_parameters=None, rope_scaling=yarn)
    assert usable_positions(load_config(ModelSpec(own))) == 2048


CHANGING = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": OWN,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [3.0 + i for i in range(8)],
    },
}


@pytest.mark.parametrize("kind", CHANGING)
def test_a_rope_that_changes_with_the_longest_row_is_trained_up_to_where_it_changes(folders, tmp_path, kind):
    """In stock transformers a row's loss depends on the rows that ran before it; here it never does."""
    folder = folders["llama"][0]
    positions = 4 * OWN if kind == "longrope" else OWN
    path = folder / "config.json"
    before = path.read_text()
    rope = {"rope_theta": 1e4} | CHANGING[kind]
    path.write_text(json.dumps(json.loads(before) | {"rope_parameters": rope, "max_position_embeddings": positions}))
    try:
        with pytest.raises(
            UserError, match=f"has {OWN} positions. For longer rows: its {kind} RoPE changes with the lo"
        ):
            refuse_more_positions(recipe_of(str(folder), OWN + 1))
        refuse_more_positions(recipe_of(str(folder), OWN))
        row = IDS[:, :OWN]
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected = stock(row).logits
            model = load_4bit(ModelSpec(str(folder), bits=16), FP32)
            assert torch.equal(model(row).logits, expected)
            model(IDS)  # a longer one before it
            assert torch.equal(model(row).logits, expected)
            if kind == "dynamic":
                stock(IDS)
                assert not torch.equal(stock(row).logits, expected)
    finally:
        path.write_text(before)


def test_a_dynamic_rope_of_the_recipe_gives_no_longer_rows_and_says_why(small_llama):
    spec = ModelSpec(str(small_llama), rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert usable_positions(load_config(spec)) == 512
    recipe = replace(RECIPE, model=spec, train=replace(RECIPE.train, seq_len=600))
    with pytest.raises(
        UserError, match="its dynamic RoPE changes with the longest row beyond them, so no row would be"
    ):
        refuse_more_positions(recipe)


def test_a_plan_counts_a_model_whose_rope_would_ask_for_the_longest_row(small_llama):
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec = ModelSpec(str(small_llama), rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = {"in_4bit": (), "dtype": torch.bfloat16, "attention": "sdpa", "kernels": "stock"}
    model = fake_lora_model(spec, LoraSpec(4, 8), 2, mode, **values)
    with mode:
        assert model(input_ids=torch.zeros(1, 8, dtype=torch.int64)).logits.shape == (1, 8, 1024)
