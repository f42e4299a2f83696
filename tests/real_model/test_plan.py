"""The plan's count of a step, against torch's allocator in a real step, at the dimensions of a real model."""

import pytest
import torch

from common.model.activation_checkpointing import Policy
from common.plan import ledger
from common.plan.forecast import Forecast, Setting
from common.recipe import LoraSpec
from tests.plan.test_count import allocated_in_a_real_step, recipe_for

LAYERS, TOKENS = 30, 256


@pytest.fixture(scope="module")
def forecasts(real_model):
    setting = Setting(torch.float32, "sdpa", triton=False)
    return {bits: Forecast(recipe_for(str(real_model), lora=LoraSpec(16, 32), bits=bits), setting) for bits in (4, 16)}


@pytest.mark.slow  # a step of 256 tokens through 30 layers
@pytest.mark.parametrize(
    ("bits", "policy"),
    [
        (4, Policy(LAYERS, LAYERS)),
        (4, Policy(LAYERS, 11)),
        (4, Policy(LAYERS, keep_attention=True)),
        (16, Policy(LAYERS)),
    ],
    ids=str,
)
def test_the_count_is_what_the_allocator_gives_out_in_a_real_step(forecasts, bits, policy, monkeypatch):
    monkeypatch.setattr(ledger, "EMPTY_ON_HOST", None)  # on a CPU host memory is an allocation like any other
    step = forecasts[bits].step(TOKENS, policy)
    counted = step.peak() - sum(step.resident.values())
    real = allocated_in_a_real_step(forecasts[bits].recipe, policy, TOKENS)
    print(f"{bits} bits, {policy}: {counted / 2**20:.2f} MiB counted, {counted / real:.4f} of the real")
    assert counted == pytest.approx(real, rel=0.02)
