import importlib
from dataclasses import replace

import pytest

from common.machine import GIB, this_machine
from common.planner import estimate_memory, plan_batch, plan_for_card
from common.recipe import UserError
from common.weights import load_config

RECIPES = {name: importlib.import_module(f"recipes.{name}").RECIPE for name in ("llama3_8b", "mistral_7b", "qwen_14b")}
LLAMA = RECIPES["llama3_8b"]


def memory_of(recipe, policy="every layer"):
    return estimate_memory(load_config(recipe.model), recipe.model, recipe.lora, policy)


def test_the_fixed_bytes_of_llama3_8b():
    memory = memory_of(LLAMA)
    # 32 layers * (2 * 4096^2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) = 6,979,321,856 weights at 4.127 bits
    assert memory.weights == int(6_979_321_856 * (4 + 8 / 64 + 32 / 16384) / 8)
    # embedding and head 2 * 128256 * 4096, 65 norms of 4096, 2 bytes each
    assert memory.embeddings_and_head == 2 * (2 * 128256 * 4096 + 65 * 4096)
    # 32 layers * rank 16 * 81,920 (in + out over 7 projections), 16 bytes each: weight, gradient, two moments in fp32
    assert memory.adapters == 16 * 41_943_040
    # gate, up or down, bf16
    assert memory.working_layer == 2 * 4096 * 14336


@pytest.mark.parametrize("name", RECIPES)
def test_rows_per_step_are_kept_whatever_the_card(name):
    for card_gib in (16, 20, 24, 48, 80):
        try:
            plan = plan_batch(RECIPES[name], card_gib * GIB, "a card")
        except UserError:
            assert card_gib == 16 and name == "qwen_14b"
            continue
        assert plan.micro_batch_rows * plan.accumulation * plan.processes == RECIPES[name].train.rows_per_step


def test_several_processes_share_the_rows(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = plan_batch(LLAMA, 24 * GIB, "a card")
    assert (plan.processes, plan.rows_per_step) == (2, 16)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="rows_per_step is 16, which 3 processes cannot share"):
        plan_batch(LLAMA, 24 * GIB, "a card")


def test_what_does_not_fit_does_the_arithmetic_and_names_the_next_move():
    long_rows = replace(LLAMA, train=replace(LLAMA.train, seq_len=8192, checkpointing="none"))
    with pytest.raises(UserError) as error:
        plan_batch(long_rows, 24 * GIB, "a card of 24 GiB")
    assert "one row does not fit a card of 24 GiB" in str(error.value)
    assert "Set checkpointing='every layer'" in str(error.value)
    with pytest.raises(UserError, match=r"Lower TrainSpec.seq_len to \d"):
        plan_batch(replace(LLAMA, train=replace(LLAMA.train, seq_len=8192)), 10 * GIB, "a card of 10 GiB")
    with pytest.raises(UserError, match="Take a smaller model"):
        plan_batch(LLAMA, 4 * GIB, "a card of 4 GiB")


def test_the_length_it_names_fits():
    recipe = replace(LLAMA, train=replace(LLAMA.train, seq_len=8192))
    with pytest.raises(UserError) as error:
        plan_batch(recipe, 10 * GIB, "a card")
    fits = int(str(error.value).split("seq_len to ")[1].replace(",", ""))
    assert (
        plan_batch(replace(recipe, train=replace(recipe.train, seq_len=fits)), 10 * GIB, "a card").micro_batch_rows == 1
    )


def test_more_positions_than_the_model_has_are_refused():
    with pytest.raises(UserError, match="seq_len is 16,384; .* has 8,192 positions"):
        plan_batch(replace(LLAMA, train=replace(LLAMA.train, seq_len=16384)), 80 * GIB, "a card")


def test_a_small_recipe_that_falls_back_to_the_cpu_says_why(monkeypatch, capsys):
    monkeypatch.setattr("common.planner.unusable_gpu", lambda: "the driver is too old")
    plan_for_card(importlib.import_module("recipes.tiny").RECIPE)
    assert "warning: training on the CPU: the driver is too old" in capsys.readouterr().out


def test_the_machine_and_the_reason_for_its_dtype_are_printed(capsys):
    plan_for_card(importlib.import_module("recipes.tiny").RECIPE)
    assert f"machine: {this_machine()}" in capsys.readouterr().out
    assert this_machine().reason in str(this_machine())


def test_a_card_is_planned_without_a_gpu(capsys):
    plan_for_card(LLAMA, dry=True)
    assert "estimated peak" in capsys.readouterr().out
