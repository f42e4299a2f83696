"""Plans of 4-bit checkpoints: the bytes that are counted are those of the tensors that load."""

import pytest
import torch

from common.machine.device import Machine
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy
from common.model.loading import load_4bit
from common.plan import ledger
from common.plan.forecast import Forecast, Setting
from common.plan.ledger import round_up
from common.plan.resident import weight_tensors
from common.plan.step import EMBEDDINGS, GATHERED, WEIGHTS
from tests.conftest import MIXED, NESTED
from tests.plan.test_count import TOKENS, allocated_in_a_real_step, recipe_for

BF16 = Machine(torch.device("cpu"), torch.bfloat16, "a test", "CPU")
FORMS = {
    "double quantization": NESTED,
    "plain scales": NESTED | {"bnb_4bit_use_double_quant": False},
    "packed in bf16": NESTED | {"bnb_4bit_quant_storage": "bfloat16"},
    "some layers in 16 bits": MIXED,
    "o_proj in 16 bits everywhere": NESTED | {"llm_int8_skip_modules": ("lm_head", "o_proj")},
    "all but one layer in 16 bits": NESTED
    | {"llm_int8_skip_modules": ("lm_head", r"model\.layers\.[1-3]"), "bnb_4bit_use_double_quant": False},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_plan_counts_the_weights_that_load(four_bit, form):
    recipe = recipe_for(str(four_bit(**form)))
    forecast = Forecast(recipe, Setting(torch.bfloat16, "sdpa"))
    counted = forecast.step(256, Policy(forecast.layers)).resident
    model = load_4bit(recipe.model, BF16)
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    loaded = sum(round_up(tensor.nbytes) for linear in linears for tensor in weight_tensors(linear))
    # A mean over the layers, rounded up: at most 2 bytes a layer too many.
    assert loaded <= counted[WEIGHTS] <= loaded + 2 * forecast.layers
    in_linears = {parameter for linear in linears for parameter in linear.parameters()}
    others = [p for p in model.parameters() if p not in in_linears] + list(model.buffers())
    assert counted[EMBEDDINGS] == sum(round_up(tensor.untyped_storage().nbytes()) for tensor in others)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_plan_counts_a_cards_part_of_them(four_bit, form):
    """Weights in both forms are shared out over the cards, scales are not."""
    recipe, cards = recipe_for(str(four_bit(**form))), 2
    forecast = Forecast(recipe, Setting(torch.bfloat16, "sdpa"), layout=Layout(cards, sharded=True))
    step = forecast.step(256, Policy(forecast.layers))
    model = load_4bit(recipe.model, BF16)
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    parts = [[round_up(tensor.nbytes) for tensor in weight_tensors(linear)] for linear in linears]
    shards, scales = sum(first / cards for first, *_ in parts), sum(sum(rest) for _, *rest in parts)
    assert step.resident[WEIGHTS] == pytest.approx(shards + scales, abs=4 * forecast.layers)
    assert forecast.layers * step.sharded_per_layer[WEIGHTS] == pytest.approx(shards, abs=4 * forecast.layers)


def test_gathered_layers_count_as_the_largest(four_bit):
    """Of three layers that are gathered at once each may be the one with its MLP in 16 bits."""
    mixed, whole = (
        Forecast(recipe_for(str(four_bit(**form))), Setting(torch.bfloat16, "sdpa"), layout=Layout(2, sharded=True))
        for form in (MIXED, NESTED)
    )
    more = mixed.step(256, Policy(4)).resident[GATHERED] - whole.step(256, Policy(4)).resident[GATHERED]
    assert more == 3 * 3 * 192 * 512 * (2 - 1 / 2)  # 3 layers of 3 linears, of 192 x 512; 16 bits instead of 4


def test_the_step_of_a_mixed_model_takes_no_more_than_is_counted(four_bit, monkeypatch):
    """A linear layer that is 4-bit in some decoder layer counts the room for its dequantized weight in all."""
    monkeypatch.setattr(ledger, "EMPTY_ON_HOST", None)  # as in tests/plan/test_count.py
    for form in (MIXED, FORMS["plain scales"]):
        forecast = Forecast(recipe_for(str(four_bit(**form))), Setting(torch.float32, "sdpa", triton=False))
        step = forecast.step(TOKENS, Policy(4))
        counted = step.peak() - sum(step.resident.values())
        assert allocated_in_a_real_step(forecast.recipe, Policy(4)) == pytest.approx(counted, rel=0.02)
