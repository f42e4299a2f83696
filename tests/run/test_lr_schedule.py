"""However short a run is, each of its steps learns."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.recipe import UserError
from common.run.lr_schedule import build_lr_schedule, lr_factor, warmup_steps
from common.run.metrics_file import read_metrics
from common.run.training import train
from tests.run.test_training import prepare

SCHEDULES = ("cosine", "linear", "constant")


def factors(schedule, ratio, steps):
    warmup = warmup_steps(ratio, steps)
    return [lr_factor(step, schedule=schedule, warmup=warmup, steps=steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.34, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 100])
def test_every_step_has_a_learning_rate_above_0_and_one_has_the_peak(schedule, ratio, steps):
    shares = factors(schedule, ratio, steps)
    assert min(shares) > 0
    assert max(shares) == 1


def test_a_warmup_of_w_steps_rises_by_equal_parts_and_the_next_step_has_the_peak():
    assert factors("constant", 0.3, 10) == [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"),
    # A share of less than a step is no warmup. 0.29 * 100 is 28.999999999999996 in floating point.
    [(0.03, 1, 0), (0.03, 33, 0), (0.03, 34, 1), (0.5, 1, 0), (0.5, 2, 1), (0.29, 100, 29), (0.99, 5, 4), (0.0, 9, 0)],
)
def test_the_warmup_is_the_whole_steps_of_its_share(ratio, steps, warmup):
    assert warmup_steps(ratio, steps) == warmup


def test_after_the_warmup_linear_and_cosine_fall_over_the_steps_that_are_left():
    # 10 steps, 2 of them warmup: 8 are left, and the first of them has the peak.
    assert factors("linear", 0.2, 10)[2:] == [1 - n / 8 for n in range(8)]
    assert factors("cosine", 0.2, 10)[2:] == [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]


def test_the_schedule_sets_the_optimizers_learning_rate_before_the_first_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    schedule, rates = build_lr_schedule(optimizer, "linear", 0.25, 4), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([4.0, 8.0, 8.0 * 2 / 3, 8.0 * 1 / 3])


def run(recipe, **values):
    """Trains, and returns the learning rates of the steps as shares of the peak, and the largest entry of any B."""
    recipe = replace(recipe, data=replace(recipe.data, eval_rows=0), train=replace(recipe.train, **values))
    train(*prepare(recipe))
    rates = [entry["learning_rate"] / recipe.train.learning_rate for entry in read_metrics(Path(recipe.out))]
    adapter = load_file(Path(recipe.out) / "adapter_model.safetensors")
    return rates, max(float(tensor.abs().max()) for name, tensor in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_learns_with_every_schedule(recipe, schedule):
    rates, largest = run(recipe, max_steps=1, lr_schedule=schedule)
    assert rates == [1.0]
    # AdamW's first update is the learning rate times the gradient's sign.
    assert largest == pytest.approx(recipe.train.learning_rate, rel=1e-3)


def test_a_fraction_of_an_epoch_that_is_one_step_learns(recipe):
    rates, largest = run(recipe, max_steps=None, epochs=0.01)
    assert rates == [1.0]
    assert largest > 0


def test_a_run_resumed_within_its_warmup_has_the_learning_rates_of_one_without_a_break(recipe, capsys):
    shape = {"max_steps": 5, "warmup_ratio": 0.8, "save_every": 3}
    whole, largest = run(recipe, **shape)
    assert whole == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1])
    (Path(recipe.out) / "checkpoints" / "checkpoint-5" / "optimizer.pt").unlink()  # as after a kill in step 4 or 5
    again = run(replace(recipe, existing_run="resume"), **shape)
    assert "checkpoint-3" in capsys.readouterr().out
    assert again == (whole, largest)


def test_a_run_that_did_not_move_its_adapter_is_no_success(recipe):
    with pytest.raises(UserError, match="2 steps taught nothing: the adapter is what it was before the first"):
        run(recipe, max_steps=2, learning_rate=1e-60)  # 0 in fp32
    assert not (Path(recipe.out) / "adapter_model.safetensors").exists()


def test_layers_that_learnt_nothing_are_named(recipe, capsys):
    model, tokenizer, rows, recipe, plan = prepare(replace(recipe, train=replace(recipe.train, max_steps=1)))
    layer = model.get_base_model().model.layers[1]
    # With all of down_proj zero, base and B alike, no gradient reaches what stands before it in the first step.
    layer.mlp.down_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.quant_state.absmax.zero_()
    layer.mlp.down_proj.weight.quant_state.offset.zero_()
    layer.mlp.down_proj.weight.quant_state.state2.absmax.zero_()
    train(model, tokenizer, rows, recipe, plan)
    out = capsys.readouterr().out
    assert "warning: 2 of 14 linear layers learnt nothing, first base_model.model.model.layers.1.mlp.gate_proj" in out
