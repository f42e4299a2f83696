"""What can be wrong with ModelSpec.rope_scaling by itself, without a model."""

import re

import pytest
from transformers import LlamaConfig

from common.commands.set_fields import set_fields
from common.recipe import ModelSpec, UserError
from common.rope_scaling import _KEYS, needed_keys
from recipes.tiny import RECIPE

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("yarn", " is 'yarn'; give a dict: {"),
        ([("factor", 2.0)], " is [('factor', 2.0)]; give a dict: {"),
        ({}, " has no rope_type; give one of 'linear', 'dynamic', 'yarn', 'llama3'"),
        ({"type": "yarn", "factor": 4.0}, " has no rope_type; it is what type is here"),
        ({"rope_type": "longrope", "factor": 4.0}, ": rope_type is 'longrope'; choose one of 'linear', 'dynamic'"),
        ({"rope_type": ["yarn"], "factor": 4.0}, ": rope_type is ['yarn']; choose one of"),
        (
            {"rope_type": "default"},
            ": rope_type is 'default'; choose one of 'linear', 'dynamic', 'yarn', 'llama3', or N",
        ),
        ({"rope_type": "yarn", "factor": 4.0}, " needs original_max_position_embeddings: rope_type is 'yarn'"),
        ({"rope_type": "llama3", "factor": 4.0}, " needs low_freq_factor and high_freq_factor and original_max_posit"),
        ({"rope_type": "linear"}, " needs factor: rope_type is 'linear'"),
        (
            LINEAR | {"original_max_position_embeddings": 9},
            " has 'original_max_position_embeddings'; linear has factor",
        ),
        (LINEAR | {"beta_fast": 32.0}, " has 'beta_fast'; linear has factor, rope_theta"),
        (YARN | {"betafast": 32.0}, " has 'betafast'; do you mean beta_fast?"),
        (YARN | {"partial_rotary_factor": 0.5}, " has 'partial_rotary_factor'; "),
        (LINEAR | {1: 2}, " has 1; linear has factor, rope_theta"),
        (LINEAR | {"factor": "2"}, ": factor is '2', a text; give a number"),
        (LINEAR | {"factor": True}, ": factor is True; give a number"),
        (LINEAR | {"factor": None}, ": factor is None; give a number"),
        (LINEAR | {"factor": 1}, ": factor is 1; it must be above 1"),
        (LINEAR | {"factor": 0.5}, ": factor is 0.5; it must be above 1"),
        (LINEAR | {"factor": float("nan")}, ": factor is nan; it must be above 0, and finite"),
        (LINEAR | {"factor": float("inf")}, ": factor is inf; it must be above 0, and finite"),
        (LINEAR | {"rope_theta": -1e4}, ": rope_theta is -10000.0; it must be above 0"),
        (
            YARN | {"original_max_position_embeddings": 32768.0},
            ": original_max_position_embeddings is 32768.0, which has",
        ),
        (YARN | {"original_max_position_embeddings": 0}, ": original_max_position_embeddings is 0; it must be above 0"),
        (YARN | {"truncate": 1}, ": truncate is 1; give True or False"),
        (YARN | {"beta_slow": 40.0}, ": beta_fast is 32.0 and beta_slow is 40.0; beta_fast must be the larger one"),
        (LLAMA3 | {"low_freq_factor": 4.0}, ": high_freq_factor is 4.0 and low_freq_factor is 4.0; high_freq_factor m"),
        (YARN | {"mscale": 1.0}, " has one of mscale and mscale_all_dim; give both"),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0}, " has attention_factor, beside which"),
    ],
)
def test_what_is_no_scaling_is_refused_before_anything_is_looked_up(scaling, message):
    with pytest.raises(UserError, match=f"^ModelSpec.rope_scaling{re.escape(message)}"):
        ModelSpec("nobody/nothing", rope_scaling=scaling)


@pytest.mark.parametrize("scaling", [YARN, LINEAR, LLAMA3, YARN | {"truncate": False, "attention_factor": 1}])
def test_whole_numbers_are_numbers_and_a_spec_keeps_its_own_copy(scaling):
    given = scaling | {"factor": int(scaling["factor"])}
    spec = ModelSpec("x", rope_scaling=given)
    given["factor"] = 99
    assert spec.rope_scaling == scaling and spec == ModelSpec("x", rope_scaling=scaling) != ModelSpec("x")
    assert type(spec.rope_scaling["factor"]) is float  # transformers warns of an attention_factor that is none


def test_the_keys_are_those_that_transformers_takes(monkeypatch):
    """Asked of its own checks, which call _check_received_keys with the keys that a kind needs and may have."""
    told: dict[str, tuple[set[str], set[str]]] = {}

    def note(kind, received, needed, optional_keys=None, ignore_keys=None):
        told[kind] = needed, optional_keys or set()

    monkeypatch.setattr(LlamaConfig, "_check_received_keys", staticmethod(note))
    for kind, (needed, optional) in _KEYS.items():
        values = {key: 2 for key in needed} | {"rope_type": kind, "high_freq_factor": 4.0}
        getattr(LlamaConfig(max_position_embeddings=4), f"_validate_{kind}_rope_parameters")(values)
        always = {"rope_theta", "partial_rotary_factor"}
        assert told[kind][0] - always == set(needed_keys(kind))
        assert told[kind][1] - always == set(optional)


def test_it_can_be_typed_with_a_command():
    typed = "model.rope_scaling=rope_type:yarn,factor:4,original_max_position_embeddings:32768,truncate:False"
    assert set_fields(RECIPE, typed).model.rope_scaling == YARN | {"truncate": False}
    scaled = set_fields(RECIPE, typed)
    assert set_fields(scaled, "model.rope_scaling=None").model == RECIPE.model
    for text, message in (("yarn", "has no rope_type"), ("rope_type:linear,factor:x", "factor is 'x', a text")):
        with pytest.raises(UserError, match=message):
            set_fields(RECIPE, f"model.rope_scaling={text}")
