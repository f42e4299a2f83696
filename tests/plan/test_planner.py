import importlib
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from common.machine.device import GIB, this_machine
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy
from common.plan import planner as module
from common.plan.planner import (
    Card,
    Plan,
    Planner,
    choose_option,
    fits_whole,
    make_plan,
    plan_for_card,
    plan_on,
    smallest_of,
)
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec, UserError

LLAMA, MISTRAL, QWEN = "meta-llama/Meta-Llama-3-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3", "Qwen/Qwen3-14B"
RECIPE = Recipe(ModelSpec(LLAMA), DataSpec("none"), LoraSpec(16, 16), TrainSpec(2048, 16, 2e-4))


def edited(**train) -> Recipe:
    return replace(RECIPE, train=replace(RECIPE.train, **train))


@cache
def counts(recipe: Recipe) -> Planner:
    return Planner(recipe, Card.of_size(24))


def planner(recipe: Recipe, gib: float) -> Planner:
    """A planner for a card of this size that shares its counts with the others of its recipe."""
    shared = Planner(recipe, Card.of_size(gib))
    shared.forecast = counts(recipe).forecast
    return shared


def plan(recipe: Recipe, gib: float) -> Plan:
    shared = planner(recipe, gib)
    return make_plan(shared, shared.choose())


@pytest.mark.parametrize(
    "name", [LLAMA, pytest.param(MISTRAL, marks=pytest.mark.slow), pytest.param(QWEN, marks=pytest.mark.slow)]
)
def test_rows_per_step_are_kept_whatever_the_card_and_a_larger_one_is_no_slower(name):
    recipe, speeds, kept = replace(RECIPE, model=ModelSpec(name)), [], []
    for gib in (16, 20, 24, 48, 80):
        shared = planner(recipe, gib)
        option = shared.choose()
        chosen = make_plan(shared, option)
        assert chosen.micro_batch_rows * chosen.accumulation * chosen.layout.processes == 16
        assert option.peak + shared.card.unseen <= gib * GIB
        speeds.append(1 / option.seconds_per_token)
        kept.append(option.policy.kept * option.rows)
    assert speeds == sorted(speeds)
    assert kept == sorted(kept)


@pytest.mark.parametrize("gib", [12, 16, 24, 40])
def test_nothing_that_fits_is_faster(gib):
    shared = planner(RECIPE, gib)
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
    shared = planner(RECIPE, 24)
    for rows in (1, 2, 4, 8):
        for policy in (Policy(32, 32), Policy(32), Policy(32, 12), Policy(32, offload=True)):
            between, (exact, _) = shared.option(rows, policy), shared.exact(rows, policy)
            assert 0 <= between.peak - exact.peak <= 32 << 20, (rows, policy)  # the loss's tiles
            assert between.seconds_per_token == pytest.approx(exact.seconds_per_token, rel=0.02)


def test_the_longest_row_fits_and_a_longer_one_does_not():
    shared = planner(replace(RECIPE, model=ModelSpec(MISTRAL)), 24)
    for policy in (Policy(32), Policy(32, offload=True)):
        longest = shared.longest_row(policy)
        fitting, longer = (shared.forecast.step(tokens, policy).peak() for tokens in (longest, longest + 512))
        assert fitting <= shared.card.budget < longer


def test_several_processes_share_the_rows(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = plan_on(RECIPE, Card.of_size(24))
    assert (shared.layout, shared.rows_per_step) == (Layout(2), 16)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="rows_per_step is 16, which 3 processes cannot share"):
        plan_on(RECIPE, Card.of_size(24))


def test_rows_that_cannot_be_split_evenly_are_taken_one_by_one_and_the_plan_says_why():
    seven = plan(edited(rows_per_step=7), 24)
    assert (seven.micro_batch_rows, seven.accumulation) == (1, 7)
    assert "2 rows at a time would fit too, but 7 rows cannot be split evenly into parts of 2" in seven.text


@pytest.mark.parametrize("name", ["none", "every layer", "keep attention", "offload"])
def test_a_named_policy_is_obeyed(name):
    chosen = plan(edited(checkpointing=name), 24)
    assert chosen.checkpointing == Policy.named(name, 32)


def test_the_plan_says_what_it_chose():
    chosen = plan(replace(RECIPE, model=ModelSpec(QWEN)), 16)
    assert re.search(r"\d+ micro-batches of \d rows?; the first \d+ of 40 layers recompute", chosen.text)
    assert re.search(r"predicted peak \d+\.\d GiB allocated, \d+\.\d GiB of a card of 16 GiB", chosen.text)
    assert "layers keep their activations" in chosen.text
    assert chosen.optimizer_bytes > 2 * 4 * 64_000_000  # two moments in fp32 of 64.2 M parameters (FACTS section 2)


def moves(recipe: Recipe, gib: float) -> tuple[str, list[Recipe]]:
    """What the refusal says, and the recipe with each change that it names."""
    with pytest.raises(UserError) as error:
        plan(recipe, gib)
    message, changed = str(error.value), []
    for tokens in re.findall(r"seq_len=(\d+)", message):
        changed.append(replace(recipe, train=replace(recipe.train, seq_len=int(tokens))))
    for rank in re.findall(r"rank=(\d+)", message):
        changed.append(replace(recipe, lora=replace(recipe.lora, rank=int(rank))))
    for policy in re.findall(r"checkpointing='([a-z ]+)'", message):
        changed.append(replace(recipe, train=replace(recipe.train, checkpointing=policy)))
    return message, changed


@pytest.mark.parametrize(
    ("recipe", "gib", "named"),
    [
        pytest.param(edited(seq_len=8192), 8, ["seq_len="], marks=pytest.mark.slow),
        (edited(seq_len=4096, checkpointing="every layer"), 8.2, ["seq_len=", "checkpointing='offload'"]),
        pytest.param(replace(RECIPE, lora=LoraSpec(256, 256)), 16, ["LoraSpec.rank="], marks=pytest.mark.slow),
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
        assert plan(change, gib).micro_batch_rows >= 1


def test_a_policy_that_does_not_fit_names_a_leaner_one():
    message, changed = moves(edited(checkpointing="none"), 12)
    assert "checkpointing='every layer'" in message
    for recipe in changed:
        assert plan(recipe, 12).micro_batch_rows >= 1


def test_a_card_smaller_than_the_weights_is_too_small():
    with pytest.raises(UserError, match="The model alone is too large: take a smaller model, or a larger card"):
        plan(RECIPE, 4)


def test_more_positions_than_the_model_has_are_refused():
    with pytest.raises(UserError, match="seq_len is 16,384; .* has 8,192 positions"):
        plan(edited(seq_len=16384), 80)
    with pytest.raises(UserError, match="seq_len is 4,096; models/tiny has"):
        plan_for_card(replace(TINY, train=replace(TINY.train, seq_len=4096)))


def test_what_a_card_keeps_for_itself():
    card = Card.of_size(24)
    # 0.5 GiB context, three cuBLAS workspaces of 32 MiB, 3 % of the card
    assert card.size - card.budget == GIB // 2 + 3 * (32 << 20) + int(0.03 * 24 * GIB)
    assert Card("free on a GPU", 24 * GIB, context_is_there=True).budget == card.budget + GIB // 2


TINY = replace(RECIPE, model=ModelSpec("models/tiny"), card_gib=None, train=TrainSpec(256, 16, 1e-3))


def test_on_a_cpu_the_tokens_of_a_micro_batch_are_limited(capsys):
    chosen = plan_for_card(TINY)
    assert (chosen.micro_batch_rows, chosen.accumulation) == (1024 // 256, 4)
    assert chosen.checkpointing == Policy(4, 4)
    assert plan_for_card(replace(TINY, train=replace(TINY.train, checkpointing="offload"))).checkpointing.offload


def test_a_small_recipe_that_falls_back_to_the_cpu_says_why(monkeypatch, capsys):
    monkeypatch.setattr(module, "unusable_gpu", lambda: "the driver is too old")
    plan_for_card(TINY)
    out = capsys.readouterr().out
    assert "warning: training on the CPU: the driver is too old" in out
    assert f"machine: {this_machine()}" in out
    assert this_machine().reason in str(this_machine())


def test_a_recipe_for_a_gpu_needs_one():
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        plan_for_card(importlib.import_module("recipes.llama3_8b").RECIPE)


# Several cards.

CARD_24 = Card.of_size(24)


def test_a_model_that_fits_a_card_is_whole_on_each():
    shared, option = choose_option(RECIPE, CARD_24, None, 2)
    assert (shared.layout, option.on_host) == (Layout(2), 0)
    text = make_plan(shared, option).text
    assert "on each of 2 processes" in text and "data parallel: each of 2 cards has the whole model" in text
    alone = plan(RECIPE, 24)
    assert make_plan(shared, option).peak_bytes > alone.peak_bytes * 0.99  # type: ignore[operator]


@pytest.fixture(scope="module")
def cut_planner() -> Planner:
    """Of Llama 3 8B over two cards, its counts shared by the tests below."""
    return Planner(RECIPE, Card.of_size(8), None, Layout(2, sharded=True))


def on_cards(shared: Planner, gib: float, host: int | None = None) -> Planner:
    other = Planner(shared.recipe, replace(Card.of_size(gib), host=host), None, shared.layout)
    other.forecast = shared.forecast
    return other


@pytest.mark.slow
def test_smaller_cards_hold_fewer_parts_and_keep_the_contract(cut_planner):
    """From 24 GiB, where a card holds all of its parts, to 6, where they wait in host memory."""
    found = []
    for gib in (24, 8, 6):
        shared = on_cards(cut_planner, gib)
        option = shared.choose()
        chosen = make_plan(shared, option)
        assert chosen.rows_per_step == 16
        assert chosen.layout == Layout(2, sharded=True, on_host=option.on_host)
        assert option.peak + shared.card.unseen <= gib * GIB
        assert ("in host memory for each card" in chosen.text) == bool(option.host)
        found.append(option.on_host)
    assert found[0] == 0 < found[-1]  # in between a larger micro-batch may be worth more than parts on the card


def test_no_fewer_parts_in_host_memory_would_fit(cut_planner):
    shared = on_cards(cut_planner, 6)
    option = shared.choose()
    fewer, _ = shared.exact(option.rows, option.policy, option.on_host - 1)
    assert shared.fits(option) and not shared.fits(fewer)


def test_the_text_says_what_a_card_holds(cut_planner):
    shared = on_cards(cut_planner, 8)
    option = shared.choose()
    _, step = shared.exact(option.rows, option.policy, option.on_host)
    text = make_plan(shared, option).text
    parts, whole, gathered = (float(n) for n in re.findall(r"(\d+\.\d) GiB (?:of parts|whole|of layers)", text))
    assert parts == pytest.approx((32 - option.on_host) * sum(step.cut.values()) / GIB, abs=0.05)
    assert whole > 1.9  # embedding and head, 2 * 128,256 * 4,096 * 2 bytes
    assert gathered > 0


def test_host_memory_is_a_limit_too(cut_planner):
    needed = on_cards(cut_planner, 6).choose().host
    assert needed > 0
    assert on_cards(cut_planner, 6, host=needed).choose().host <= needed
    with pytest.raises(UserError, match=r"do not fit the host memory: .* for each card, and 0.1 GiB are available"):
        on_cards(cut_planner, 6, host=GIB // 10).choose()


def test_what_fits_no_card_of_several_says_what_would(cut_planner):
    with pytest.raises(
        UserError, match=r"does not fit a card of 2.5 GiB, layers sharded over 2 cards .*larger cards, or"
    ):
        on_cards(cut_planner, 2.5).choose()
    with pytest.raises(UserError, match="or let several share it"):
        plan(RECIPE, 5)
    with pytest.raises(UserError, match="let the cards share it"):
        choose_option(edited(sharding="never"), Card.of_size(6), None, 2)
    with pytest.raises(UserError, match="LoraSpec.dora"):
        choose_option(replace(RECIPE, lora=LoraSpec(16, 16, dora=True)), Card.of_size(6), None, 2)


def test_a_recipe_may_ask_for_sharding(cut_planner):
    shared, option = choose_option(edited(sharding="always"), CARD_24, None, 2)
    assert shared.layout.sharded and option.on_host == 0
    assert fits_whole(RECIPE, CARD_24, 2) and not fits_whole(RECIPE, Card.of_size(6), 2)


def test_the_smallest_card_is_planned_for():
    large, small = Card.of_size(24), Card.of_size(16)
    bf16, fp16 = torch.bfloat16, torch.float16
    assert smallest_of([(large, bf16), (large, bf16)]) == large
    smallest = smallest_of([(large, bf16), (small, bf16)])
    assert (smallest.size, smallest.name) == (small.size, "a card of 16 GiB, the smallest of 2 cards")
    with pytest.raises(UserError, match="do not compute in one number format"):
        smallest_of([(large, bf16), (small, fp16)])


@pytest.mark.slow
def test_llama_3_70b_fits_two_cards_of_24_gib():
    recipe = importlib.import_module("recipes.llama3_70b").RECIPE
    shared, option = choose_option(recipe, CARD_24, None, 2)
    assert shared.layout.sharded and 0 < option.on_host < 80
    assert option.peak + shared.card.unseen <= 24 * GIB
    with pytest.raises(UserError, match="let several share it"):
        choose_option(recipe, CARD_24, None, 1)
