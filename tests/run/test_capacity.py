"""The rule of capacity, with the parameters that an adapter of Llama 3 8B has."""

from dataclasses import replace

import pytest
from datasets import Dataset

from common.data.rows import Rows, load_rows
from common.model.loading import load_tokenizer
from common.recipe import LoraSpec, TrainSpec
from common.run.capacity import capacity_warning, tokens_to_learn, warn_of_capacity
from recipes.tiny import RECIPE

RANK_16 = 41_943_040  # of Llama 3 8B, all linear layers


@pytest.mark.parametrize("tokens", [0, 1e6, 41e6, 83.8e6])
def test_what_an_adapter_holds_is_not_mentioned(tokens):
    assert capacity_warning(tokens, RANK_16, LoraSpec(16, 32)) is None


@pytest.mark.parametrize(
    ("tokens", "rank", "lora", "parameters"),
    [
        (84e6, 32, LoraSpec(16, 32), RANK_16),
        (400e6, 128, LoraSpec(16, 32), RANK_16),
        (70e6, 32, LoraSpec(24, 32), RANK_16 * 24 // 16 // 2),  # half of the layers, a rank that is no power of two
        (1.3e9, 256, LoraSpec(8, 32, dora=True), RANK_16 // 2),
    ],
)
def test_the_rank_that_holds_the_tokens_is_named(tokens, rank, lora, parameters):
    said = capacity_warning(tokens, parameters, lora)
    assert f"LoraSpec(rank={rank}) holds them, with alpha left at 32" in said
    assert capacity_warning(tokens, parameters * rank // lora.rank, LoraSpec(rank, 32)) is None


def test_too_much_for_any_adapter():
    said = capacity_warning(20e9, RANK_16, LoraSpec(16, 32))
    assert "LoraSpec(rank=512) holds 2,684.4 million" in said and "full fine-tuning learns more" in said


def test_alpha_is_not_mentioned_where_its_scale_depends_on_the_root_of_the_rank():
    assert "alpha" not in capacity_warning(100e6, RANK_16, LoraSpec(16, 32, rslora=True))


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({}, 60),  # 20 rows of 3 trained tokens
        ({"epochs": 3}, 60),  # the same ones again
        ({"epochs": 0.5}, 36),  # 3 of 5 steps, 12 rows
        ({"max_steps": 2}, 24),
        ({"max_steps": 500}, 60),
    ],
)
def test_each_token_of_the_data_counts_once_and_only_where_the_run_comes_to_it(values, tokens):
    row = {"input_ids": [7] * 5, "labels": [-100, -100, 7, 7, 7], "seq_lengths": [5]}
    rows = Rows(Dataset.from_list([row] * 20), None, [])
    assert tokens_to_learn(rows, TrainSpec(8, 4, 1e-3, **values)) == pytest.approx(tokens)


def test_the_small_recipe_has_an_adapter_that_is_large_enough_and_one_parameter_in_a_hundred_of_it_is_not():
    train = RECIPE.train
    rows = load_rows(RECIPE.data, load_tokenizer(RECIPE.model), train.seq_len, train.seed)
    assert warn_of_capacity(rows, RECIPE) is None
    small = replace(RECIPE, lora=LoraSpec(1, 32, target_modules=("k_proj",)))
    assert "(rank 1) holds about" in warn_of_capacity(rows, small)
