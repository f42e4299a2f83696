"""The search: what it chooses fits, and nothing that fits is faster."""

from dataclasses import replace

import pytest
import torch

from common.machine.device import GIB
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy
from common.plan.card import Card
from common.plan.forecast import Setting
from common.plan.plan import make_plan
from common.plan.planner import Planner
from common.recipe import ModelSpec
from tests.plan.planners import LLAMA, MISTRAL, QWEN, RECIPE, SHARDED, edited, plan_for, planner_for


@pytest.mark.parametrize(
    "name", [LLAMA, pytest.param(MISTRAL, marks=pytest.mark.slow), pytest.param(QWEN, marks=pytest.mark.slow)]
)
def test_rows_per_step_are_kept_whatever_the_card_and_a_larger_one_is_no_slower(name):
    recipe, speeds, kept = replace(RECIPE, model=ModelSpec(name)), [], []
    for gib in (16, 20, 24, 48, 80):
        shared = planner_for(recipe, gib)
        option = shared.choose()
        chosen = make_plan(shared, option)
        assert chosen.micro_batch_rows * chosen.accumulation * chosen.layout.processes == 16
        assert option.peak + shared.card.overhead_bytes <= gib * GIB
        speeds.append(1 / option.seconds_per_token)
        kept.append(option.policy.kept * option.rows)
    assert speeds == sorted(speeds)
    assert kept == sorted(kept)


@pytest.mark.parametrize("gib", [12, 16, 24, 40])
def test_nothing_that_fits_is_faster(gib):
    shared = planner_for(RECIPE, gib)
    chosen = shared.choose()
    policies = [
        Policy(32, kept, offload=offload) for kept in (0, 4, 8, 12, 16, 20, 24, 28) for offload in (False, True)
    ]
    for rows in (1, 2, 4, 8):
        for policy in [*policies, Policy(32, 32)]:
            option, _ = shared.exact(rows, policy)
            if shared.fits(option):
                # the times of what was chosen and of this are counted alike; 1e-3 for the steps of the grid
                assert chosen.seconds_per_token <= option.seconds_per_token * (1 + 1e-3), (rows, policy)


def test_two_counts_tell_those_between():
    shared = planner_for(RECIPE, 24)
    for rows in (1, 2, 4, 8):
        for policy in (Policy(32, 32), Policy(32), Policy(32, 12), Policy(32, offload=True)):
            between, (exact, _) = shared.interpolate(rows, policy), shared.exact(rows, policy)
            assert 0 <= between.peak - exact.peak <= 32 << 20, (rows, policy)  # the loss's tiles
            assert between.seconds_per_token == pytest.approx(exact.seconds_per_token, rel=0.02)


FP16_WITH_MASK = Setting(torch.float16, "sdpa")  # of a GPU without flash attention, such as a T4


@pytest.fixture(scope="module")
def without_flash():
    return Planner(replace(RECIPE, model=ModelSpec(MISTRAL)), Card.of_size(16), FP16_WITH_MASK)


@pytest.mark.slow  # counts of up to 16,384 tokens
def test_with_a_mask_two_counts_tell_the_rows_between_and_three_the_longest_row(without_flash):
    for rows in (1, 4):
        between, (exact, _) = without_flash.interpolate(rows, Policy(32)), without_flash.exact(rows, Policy(32))
        assert 0 <= between.peak - exact.peak <= 8 << 20  # the loss's tiles
        assert between.seconds_per_token == pytest.approx(exact.seconds_per_token, rel=0.02)
    longest = without_flash.longest_row(Policy(32))
    fitting, longer = (without_flash.forecast.step(n, Policy(32)).peak() for n in (longest, longest + 256))
    assert fitting <= without_flash.card.budget < longer


def test_a_mask_grows_with_the_rows_and_with_the_square_of_their_length(without_flash):
    """What a layer saves: beside what grows with the tokens a mask in fp16, 2 bytes x rows x length x length."""

    def saved(rows: int, length: int) -> int:
        step = without_flash.forecast.count(rows * length, Policy(3, 3), True, rows)
        return step.segment("forward 1").net

    assert saved(8, 1024) - 8 * saved(1, 1024) == 0
    assert saved(1, 8192) - saved(8, 1024) == 2 * (8192**2 - 8 * 1024**2)


def test_the_longest_row_fits_and_a_longer_one_does_not():
    shared = planner_for(replace(RECIPE, model=ModelSpec(MISTRAL)), 24)
    for policy in (Policy(32), Policy(32, offload=True)):
        longest = shared.longest_row(policy)
        rows = (shared.forecast.step(tokens, policy, examples=1) for tokens in (longest, longest + 512))
        fitting, longer = (step.peak() for step in rows)
        assert fitting <= shared.card.budget < longer


@pytest.mark.parametrize("name", ["none", "every layer", "keep attention", "offload"])
def test_a_named_policy_is_obeyed(name):
    chosen = plan_for(edited(checkpointing=name), 24)
    assert chosen.checkpointing == Policy.named(name, 32)


@pytest.mark.slow
def test_smaller_cards_hold_fewer_parts_and_keep_the_contract():
    """From 24 GiB, where a card holds all of its parts, to 6, where they wait in host memory."""
    found = []
    for gib in (24, 8, 6):
        shared = planner_for(RECIPE, gib, SHARDED)
        option = shared.choose()
        chosen = make_plan(shared, option)
        assert chosen.rows_per_step == 16
        assert chosen.layout == Layout(2, sharded=True, on_host=option.on_host)
        assert option.peak + shared.card.overhead_bytes <= gib * GIB
        assert ("in host memory for each card" in chosen.text) == bool(option.host_bytes)
        found.append(option.on_host)
    assert found[0] == 0 < found[-1]  # in between a larger micro-batch may be worth more than parts on the card


def test_a_gathered_layer_is_set_aside_for_another_streams_memory():
    # Of one layer of Llama 3 8B: 218,103,808 weights in NF4, half a byte each; two norms of 4,096 in bf16; LoRA of rank
    # 16 in fp32, 4 * 16 * 81,920 bytes. The scales are no parameters, and are not gathered.
    layer = 218_103_808 // 2 + 2 * 2 * 4096 + 4 * 16 * 81_920
    card = planner_for(RECIPE, 24, SHARDED).card
    assert card.overhead()["another stream's layer"] == pytest.approx(
        layer, rel=1e-3
    )  # shards are rounded to 512 bytes
    assert planner_for(RECIPE, 24, Layout(2)).card.overhead()["another stream's layer"] == 0


@pytest.mark.slow
def test_no_fewer_parts_in_host_memory_would_fit():
    shared = planner_for(RECIPE, 6, SHARDED)
    option = shared.choose()
    fewer, _ = shared.exact(option.rows, option.policy, option.on_host - 1)
    assert shared.fits(option) and not shared.fits(fewer)


def test_host_memory_is_a_limit_too():
    needed = planner_for(RECIPE, 6, SHARDED).choose().host_bytes
    assert needed > 0
    assert planner_for(RECIPE, 6, SHARDED, host_bytes=needed).choose().host_bytes <= needed
    assert planner_for(RECIPE, 6, SHARDED, host_bytes=GIB // 10).choose() is None


@pytest.mark.slow  # two searches over long rows
def test_a_row_that_fits_no_other_way_is_computed_in_tiles_and_a_shorter_one_as_ever():
    """Mistral 7B on 10 GiB: the longest row without tiles is about 23,000 tokens."""
    recipe = replace(edited(seq_len=16_384), model=ModelSpec(MISTRAL))
    assert planner_for(recipe, 10).choose().policy.tile == 0
    shared = planner_for(replace(recipe, train=replace(recipe.train, seq_len=28_672)), 10)
    option = shared.choose()
    assert option.policy.tile and option.policy.kept == 0
    assert shared.fits(option)
    assert not shared.fits(shared.exact(1, Policy(32, offload=True))[0])
    in_words = make_plan(shared, option).text
    assert f"in tiles of {option.policy.tile:,} tokens" in in_words and "GiB in host memory" in in_words


def test_with_stock_layers_or_a_policy_that_keeps_all_there_are_no_tiles():
    assert planner_for(edited(kernels="stock"), 24).policies_in_tiles("auto") == []
    assert planner_for(edited(), 24).policies_in_tiles("none") == []
    tiles = planner_for(edited(), 24).policies_in_tiles("every layer")
    assert tiles and not any(policy.offload for policy in tiles)


@pytest.mark.parametrize("way", [0, pytest.param(3, marks=pytest.mark.slow)])  # many small tiles
def test_the_longest_row_in_tiles_is_told_from_short_ones_and_fits(way):
    shared = planner_for(RECIPE, 12)
    policy = shared.policies_in_tiles("offload")[way]
    longest = shared.longest_row(policy)
    rows = (shared.forecast.step(tokens, policy, examples=1) for tokens in (longest, longest + 512))
    fitting, longer = (step.peak() for step in rows)
    assert fitting <= shared.card.budget < longer


def test_the_host_bounds_the_longest_row():
    policy = planner_for(RECIPE, 24).policies_in_tiles("offload")[-1]
    # 32 inputs of 4,096 numbers in 16 bits a token: 256 KiB
    shared = planner_for(RECIPE, 24, host_bytes=8 * GIB)
    assert shared.longest_row(policy) == 8 * GIB // (256 << 10)


def test_scratch_memory_is_that_of_the_examples_that_a_row_has():
    """It is of one layer at a time: 128 tokens an example of 32 heads of 128 numbers and one, in fp32."""
    forecast = planner_for(RECIPE, 24).forecast
    few, many = (forecast.step(4_096, Policy(32), examples=count).peak() for count in (1_000, 1_040))
    assert many - few == 40 * 128 * 32 * 129 * 4
    assert forecast.examples_in(2048) == 32  # of 64 tokens, while the data are not known
    assert planner_for(edited(seq_len=8192), 24).forecast.examples_in(8192) == 1
    known = Planner(RECIPE, Card.of_size(24), Setting(examples_per_row=100)).forecast
    assert known.examples_in(2048) == 100 and known.examples_in(3 * 2048) == 300
