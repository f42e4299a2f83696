"""From a recipe and a card to a plan, and what its text says."""

import importlib
import re
from dataclasses import replace

import pytest

from common.machine.device import GIB
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy
from common.plan.card import Card
from common.plan.misfit import choose_or_explain
from common.plan.plan import build_plan, choose_option, fits_whole, make_plan, plan_on
from common.recipe import ModelSpec, UserError
from tests.plan.planners import QWEN, RECIPE, SHARDED, edited, plan_for, planner_for

CARD_24 = Card.of_size(24)


def test_several_processes_share_the_rows(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = plan_on(RECIPE, Card.of_size(24))
    assert (shared.layout, shared.rows_per_step) == (Layout(2), 16)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="rows_per_step is 16, which 3 processes cannot share"):
        plan_on(RECIPE, Card.of_size(24))


def test_rows_that_cannot_be_split_evenly_are_taken_one_by_one_and_the_plan_says_why():
    seven = plan_for(edited(rows_per_step=7), 24)
    assert (seven.micro_batch_rows, seven.accumulation) == (1, 7)
    assert "2 rows at a time would fit too, but 7 rows cannot be split evenly into parts of 2" in seven.text


def test_the_plan_says_what_it_chose():
    chosen = plan_for(replace(RECIPE, model=ModelSpec(QWEN)), 16)
    assert re.search(r"\d+ micro-batches of \d rows?; the first \d+ of 40 layers recompute", chosen.text)
    assert re.search(r"predicted peak \d+\.\d GiB allocated, \d+\.\d GiB of a card of 16 GiB", chosen.text)
    assert "layers keep their activations" in chosen.text
    assert chosen.optimizer_bytes > 2 * 4 * 64_000_000  # two moments in fp32 of 64.2 M parameters (FACTS section 2)


def test_a_model_that_fits_a_card_is_whole_on_each():
    shared, option = choose_option(RECIPE, CARD_24, None, 2)
    assert (shared.layout, option.on_host) == (Layout(2), 0)
    text = make_plan(shared, option).text
    assert "on each of 2 processes" in text and "data parallel: each of 2 cards has the whole model" in text
    alone = plan_for(RECIPE, 24)
    assert make_plan(shared, option).peak_bytes > alone.peak_bytes * 0.99  # type: ignore[operator]


def test_the_text_says_what_a_card_holds():
    shared = planner_for(RECIPE, 8, SHARDED)
    option = shared.choose()
    _, step = shared.exact(option.rows, option.policy, option.on_host)
    text = make_plan(shared, option).text
    parts, whole, gathered = (float(n) for n in re.findall(r"(\d+\.\d) GiB (?:of parts|whole|of layers)", text))
    assert parts == pytest.approx((32 - option.on_host) * sum(step.sharded_per_layer.values()) / GIB, abs=0.05)
    assert whole > 1.9  # embedding and head, 2 * 128,256 * 4,096 * 2 bytes
    assert gathered > 0


def test_a_recipe_may_ask_for_sharding():
    shared, option = choose_option(edited(sharding="always"), CARD_24, None, 2)
    assert shared.layout.sharded and option.on_host == 0
    assert fits_whole(RECIPE, CARD_24, 2) and not fits_whole(RECIPE, Card.of_size(6), 2)


@pytest.mark.slow
def test_llama_3_70b_fits_two_cards_of_24_gib():
    recipe = importlib.import_module("recipes.llama3_70b").RECIPE
    for sharding in ("auto", "always"):
        two = replace(recipe, train=replace(recipe.train, sharding=sharding))
        shared, option = choose_option(two, CARD_24, None, 2)
        assert shared.layout.sharded == (sharding == "always") and option.on_host > 0
        assert option.peak + shared.card.overhead_bytes <= 24 * GIB
    whole = replace(recipe, train=replace(recipe.train, weights_on_host=0))
    with pytest.raises(UserError, match="let several share it"):
        choose_option(whole, CARD_24, None, 1)
    one, option = choose_option(recipe, CARD_24, None, 1)
    assert option.on_host > 2 and option.peak + one.card.overhead_bytes <= 24 * GIB


@pytest.mark.parametrize(("processes", "planned"), [(1, (4, 4)), (1, (16, 1)), (2, (4, 2)), (2, (2, 4)), (16, (1, 1))])
@pytest.mark.parametrize("rows", [16, 8, 4, 2, 1])
def test_a_plan_for_fewer_rows_splits_them_evenly_and_takes_no_larger_micro_batch(processes, planned, rows):
    layout = Layout(processes)
    plan = build_plan(edited(rows_per_step="auto").train, layout, planned[0], Policy(32), "a test")
    assert (plan.micro_batch_rows, plan.accumulation) == planned
    assert plan.text.startswith("plan: up to 16 rows of 2,048 tokens per optimizer step: ")
    if rows % processes:
        return
    fewer = plan.with_rows_per_step(rows)
    assert fewer.rows_per_step == rows and fewer.micro_batch_rows <= plan.micro_batch_rows
    assert (fewer.layout, fewer.checkpointing, fewer.peak_bytes) == (plan.layout, plan.checkpointing, plan.peak_bytes)
    last = fewer.text.splitlines()[-1]
    assert last.startswith(f"  settled by the data: {rows} row")
    assert f" of {fewer.micro_batch_rows} row" in last and ("processes" in last) == (processes > 1)


def test_fewer_rows_than_planned_for_take_no_more_memory():
    """Counted: the same policy, as many rows at a time or fewer, with an earlier one's gradients or without."""
    planner = planner_for(edited(rows_per_step="auto"), 24)
    chosen = choose_or_explain(planner)
    plan = make_plan(planner, chosen)
    for rows in (8, 4, 2, 1):
        fewer = plan.with_rows_per_step(rows)
        alone = planner_for(edited(rows_per_step=rows), 24)
        assert alone.exact(fewer.micro_batch_rows, fewer.checkpointing)[0].peak <= chosen.peak
