"""What a refusal says is true: its sums, and that what it names would fit."""

import re
from dataclasses import replace

import pytest

from common.machine.device import GIB
from common.plan.card import Card
from common.plan.misfit import choose_or_explain
from common.plan.plan import choose_option
from common.recipe import LoraSpec, Recipe, UserError
from tests.plan.planners import RECIPE, SHARDED, edited, plan_for, planner_for


def moves(recipe: Recipe, gib: float) -> tuple[str, list[Recipe]]:
    """What the refusal says, and the recipe with each change that it names."""
    with pytest.raises(UserError) as error:
        plan_for(recipe, gib)
    message, changed = str(error.value), []
    for tokens in re.findall(r"seq_len=(\d+)", message):
        changed.append(replace(recipe, train=replace(recipe.train, seq_len=int(tokens))))
    for rank in re.findall(r"rank=(\d+)", message):
        changed.append(replace(recipe, lora=replace(recipe.lora, rank=int(rank))))
    if "optimizer='adamw_8bit'" in message:
        changed.append(replace(recipe, train=replace(recipe.train, optimizer="adamw_8bit")))
    if "weights_on_host='auto'" in message:
        changed.append(replace(recipe, train=replace(recipe.train, weights_on_host="auto")))
    for policy in re.findall(r"checkpointing='([a-z ]+)'", message):
        changed.append(replace(recipe, train=replace(recipe.train, checkpointing=policy)))
    return message, changed


@pytest.mark.parametrize(
    ("recipe", "gib", "named"),
    [
        pytest.param(edited(seq_len=8192, weights_on_host=0), 7.5, ["seq_len="], marks=pytest.mark.slow),
        pytest.param(
            edited(seq_len=4096, checkpointing="every layer", weights_on_host=0),
            8.25,
            ["seq_len=", "checkpointing='offload'", "optimizer='adamw_8bit'"],
            marks=pytest.mark.slow,  # 30 s: each change is planned
        ),
        pytest.param(
            replace(edited(weights_on_host=0), lora=LoraSpec(256, 256)), 16, ["LoraSpec.rank="], marks=pytest.mark.slow
        ),
    ],
)
def test_what_does_not_fit_does_the_arithmetic_and_every_change_it_names_fits(recipe, gib, named):
    message, changed = moves(recipe, gib)
    assert f"one row of {recipe.train.seq_len:,} tokens does not fit a card of {gib} GiB: " in message
    assert all(name in message for name in named), message
    total, over = map(float, re.search(r"row is (\S+) GiB over the budget of (\S+) GiB", message).groups())
    parts = map(
        float, re.search(r": (\S+) GiB for the model and its adapters \+ (\S+) GiB for the row", message).groups()
    )
    assert sum(parts) == pytest.approx(total + over, abs=0.16)  # each rounded to a tenth
    assert len(changed) >= len(named)
    for change in changed:
        assert plan_for(change, gib).micro_batch_rows >= 1


def test_a_policy_that_does_not_fit_names_a_leaner_one():
    message, changed = moves(edited(checkpointing="none", weights_on_host=0), 12)
    assert "checkpointing='every layer'" in message
    for recipe in changed:
        assert plan_for(recipe, 12).micro_batch_rows >= 1


def test_a_card_smaller_than_the_weights_is_too_small():
    with pytest.raises(UserError, match="The model alone is too large: take a smaller model, or a larger card"):
        plan_for(edited(weights_on_host=0), 4)


def test_what_fits_no_card_of_several_says_what_would():
    with pytest.raises(
        UserError, match=r"does not fit a card of 2.5 GiB, layers sharded over 2 cards .*larger cards, or"
    ):
        choose_or_explain(planner_for(RECIPE, 2.5, SHARDED))
    with pytest.raises(UserError, match="or let several share it"):
        plan_for(edited(weights_on_host=0), 5)
    with pytest.raises(UserError, match="let the cards share it"):
        choose_option(edited(sharding="never", weights_on_host=0), Card.of_size(6), None, 2)
    with pytest.raises(UserError, match="LoraSpec.dora"):
        choose_option(replace(edited(weights_on_host=0), lora=LoraSpec(16, 16, dora=True)), Card.of_size(6), None, 2)


def test_too_little_host_memory_is_said():
    with pytest.raises(UserError, match=r"do not fit the host memory: .* for each card, and 0.1 GiB are available"):
        choose_or_explain(planner_for(RECIPE, 6, SHARDED, host_bytes=GIB // 10))
