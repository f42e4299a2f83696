"""The rule of capacity, with the parameters that an adapter of Llama 3 8B has."""

import pytest

from common.recipe import LoraSpec
from common.run.capacity import capacity_warning

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
