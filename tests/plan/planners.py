"""Recipes, planners and plans for the tests of this folder."""

from dataclasses import replace

from common.machine.layout import ONE_PROCESS, Layout
from common.plan.card import Card
from common.plan.misfit import choose_or_explain
from common.plan.plan import Plan, make_plan
from common.plan.planner import Planner
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec

LLAMA, MISTRAL, QWEN = "meta-llama/Meta-Llama-3-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3", "Qwen/Qwen3-14B"
RECIPE = Recipe(ModelSpec(LLAMA), DataSpec("none"), LoraSpec(16, 16), TrainSpec(2048, 16, 2e-4))
SHARDED = Layout(2, sharded=True)


def edited(**train) -> Recipe:
    return replace(RECIPE, train=replace(RECIPE.train, **train))


def planner_for(
    recipe: Recipe, gib: float, layout: Layout = ONE_PROCESS, host_bytes: int | None = None, cards: int = 1
) -> Planner:
    """A planner for cards of this size, so many of them in a machine."""
    return Planner(recipe, replace(Card.of_size(gib), host_bytes=host_bytes, cards=cards), None, layout)


def plan_for(recipe: Recipe, gib: float) -> Plan:
    planner = planner_for(recipe, gib)
    return make_plan(planner, choose_or_explain(planner))
