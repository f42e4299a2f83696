"""Plans of recipes that learn from preferences: the pass for the reference, its time, and the longest pair."""

from dataclasses import replace

import pytest

from common.machine.device import GIB
from common.model.activation_checkpointing import Policy
from common.plan.card import WORKSPACE_BYTES
from common.plan.forecast import least_examples
from common.plan.machine_plan import plan_for_card
from common.plan.plan import make_plan
from common.plan.planner import MAX_MICRO_BATCH_TOKENS, Planner
from common.plan.report import build_report
from common.recipe import PREFERENCE_DEFAULTS, ModelSpec, PreferenceSpec, TrainSpec
from tests.plan.planners import RECIPE, planner_for

RECIPES = {loss: replace(RECIPE, preference=PreferenceSpec(loss)) for loss in PREFERENCE_DEFAULTS}


def test_the_reference_is_computed_with_the_largest_micro_batch_that_fits_without_gradients():
    planner = planner_for(RECIPES["dpo"], 24)
    assert planner.reference_rows() == MAX_MICRO_BATCH_TOKENS // 2048  # past it nothing gets faster
    small = planner_for(RECIPES["dpo"], 8)
    rows = small.reference_rows()
    assert 1 < rows < 8
    assert small.forward_peak(rows) <= small.card.budget < small.forward_peak(rows + 1)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_loss_without_a_reference_has_no_pass(loss):
    planner = planner_for(RECIPES[loss], 24)
    assert (planner.reference_rows(), planner.pass_seconds_per_token()) == (0, 0.0)
    assert planner_for(RECIPE, 24).reference_rows() == 0


# Forward passes for each token that is trained, beside the step's own: DPO's before the first step, whose share is less
# with more epochs; KTO's two before it, and one in each step.
@pytest.mark.parametrize(
    ("loss", "epochs", "passes"), [("dpo", 1, 1), ("dpo", 3, 1 / 3), ("kto", 1, 3), ("kto", 3, 1 + 2 / 3)]
)
def test_the_passes_are_in_the_modelled_time(loss, epochs, passes):
    planner = planner_for(replace(RECIPES[loss], train=replace(RECIPE.train, epochs=epochs)), 24)
    option, step = planner.exact(1, Policy(32, 32))
    of_step = step.seconds(planner.forecast.speed, planner.rows_here) / planner.seq_len
    assert option.seconds_per_token == pytest.approx(of_step + planner.pass_seconds_per_token(), rel=1e-12)
    assert planner.interpolate(1, Policy(32, 32)).seconds_per_token == pytest.approx(option.seconds_per_token, rel=0.02)
    # A step is a forward pass, a backward pass of as many matmuls, and what is not a matmul.
    assert 2 < of_step / (planner.pass_seconds_per_token() / passes) < 2.4


def test_weights_that_stream_cross_the_link_in_the_pass_too():
    planner = planner_for(RECIPES["dpo"], 24)
    whole, streamed = (planner.forecast.forward(2048, on_host=layers) for layers in (0, 32))
    assert whole.link_bytes() == 0 < streamed.link_bytes()
    assert streamed.peak() < whole.peak()
    # Weights cross the link in 0.1 s, and 16,384 tokens take longer than that to compute.
    assert planner.pass_seconds_per_token(32) >= planner.pass_seconds_per_token()


@pytest.fixture(scope="module")
def report():
    planner = planner_for(replace(RECIPES["dpo"], train=TrainSpec(4096, 16, 1e-5)), 24)
    option, _ = planner.exact(1, Policy(32, 32))
    return build_report(planner, option)


def test_the_report_tells_the_pass_and_the_longest_pair(report):
    text = " ".join(report.text().split())
    planner = planner_for(report.recipe, 24)
    peak = (planner.forward_peak(4) + WORKSPACE_BYTES) / GIB
    assert report.plan.reference_rows == 4
    assert f"log-likelihoods under the reference, 4 rows at a time, {peak:.1f} GiB: 31% of the modelled" in text
    assert "longest pair of answers, both with their prompt, that fits" in text


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_longest_row_leaves_room_for_every_pass(loss):
    planner: Planner = planner_for(RECIPES[loss], 16)
    longest = planner.longest_row(Policy(32))
    step = planner.forecast.step(longest, Policy(32), examples=least_examples(planner.recipe))
    assert planner.forecast.forward(longest).peak() < step.peak() <= planner.card.budget


def test_kto_says_what_it_computes_before_each_step():
    planner = planner_for(RECIPES["kto"], 24)
    option, _ = planner.exact(1, Policy(32, 32))
    assert "and before each step those of answers to other prompts: " in make_plan(planner, option).text


@pytest.mark.parametrize(("loss", "rows"), [("dpo", 4), ("simpo", 0)])
def test_a_cpu_has_its_own_micro_batch(loss, rows, capsys):
    tiny = replace(RECIPES[loss], model=ModelSpec("models/tiny"), card_gib=None, train=TrainSpec(256, 2, 1e-3))
    plan = plan_for_card(tiny)
    assert (plan.micro_batch_rows, plan.reference_rows) == (2, rows)  # 1,024 tokens at a time, whatever a step has


def test_a_long_row_that_is_evaluated_takes_less_than_its_training_step():
    """In the same tiles: so the pass for the reference and the held-out loss fit where the step does."""
    policy = Policy(32, offload=True, tile=4096, by_head=True)
    planner, tokens = planner_for(RECIPES["dpo"], 24), 65_536
    step = planner.forecast.step(tokens, policy)
    whole = planner.forecast.forward(tokens)
    tiled = planner.forecast.forward(tokens, tile=policy.tile, by_head=policy.by_head)
    assert tiled.peak() < step.peak() < whole.peak()
