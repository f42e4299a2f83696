import json
import struct
from dataclasses import replace

import pytest

from common.machine.device import GIB
from common.model.activation_checkpointing import Policy
from common.plan.card import Card
from common.plan.picture import POINTS, curve, draw_plan, phases
from common.plan.planner import Planner
from common.plan.report import (
    CHOICE,
    EVERY_LAYER,
    NO_CHECKPOINTING,
    OFFLOAD,
    OVERHEAD,
    TEXT_WIDTH,
    WAYS_IN_TILES,
    build_report,
)
from common.plan.report_json import write_json
from common.plan.step import KINDS
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec, UserError

CARD = Card.of_size(16)


@pytest.fixture(scope="module")
def planner():
    model, data = ModelSpec("Qwen/Qwen3-14B"), DataSpec("trl-lib/Capybara")
    return Planner(Recipe(model, data, LoraSpec(16, 16), TrainSpec(2048, 16, 2e-4)), CARD)


@pytest.fixture(scope="module")
def mixture(planner):
    """A mixture as the planner chooses it for this card; to search for it would take longer than these tests."""
    option, _ = planner.exact(1, Policy(40, kept=7, offload=True))
    return build_report(planner, option)


@pytest.fixture(scope="module")
def values(mixture, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_json(mixture, path)
    return json.loads(path.read_text())


def test_a_plan_stands_beside_the_three_plain_policies(mixture):
    kept = {row.name: (row.policy.kept, row.policy.offload) for row in mixture.rows}
    assert kept == {NO_CHECKPOINTING: (40, False), EVERY_LAYER: (0, False), OFFLOAD: (0, True), CHOICE: (7, True)}


def test_the_parts_of_a_row_add_up_to_its_exact_peak_and_what_no_count_sees(planner, mixture):
    for row in mixture.rows:
        option, _ = planner.exact(1, row.policy)
        assert tuple(row.parts) == (*KINDS, OVERHEAD)
        assert row.peak == sum(row.parts.values()) == option.peak + CARD.overhead_bytes
        assert row.fits == planner.fits(option) == (row.peak <= CARD.size)


def test_time_is_relative_to_no_checkpointing(mixture):
    times = {row.name: row.relative_time for row in mixture.rows}
    assert times[NO_CHECKPOINTING] == 1.0
    # Backward is twice forward but for the weights' gradients, which LoRA has not: forward + backward are 2 forwards, a
    # recompute makes them 3. Head and loss do not recompute, so it is below 1.5; 7 of 40 layers less are between.
    assert 1.0 < times[CHOICE] < times[EVERY_LAYER] < 1.5


def test_only_rows_that_offload_need_host_memory(mixture):
    host = {row.name: row.step.host_peak() for row in mixture.rows}
    assert host[NO_CHECKPOINTING] == host[EVERY_LAYER] == 0
    # Layer inputs of 2,048 tokens * 5,120 in bf16 are 20 MiB.
    assert host[OFFLOAD] == 40 * 20 << 20
    assert host[CHOICE] == 33 * 20 << 20


def test_the_longest_row_is_longer_with_the_boundaries_on_the_host(planner, mixture):
    assert 2048 < mixture.longest[EVERY_LAYER] < mixture.longest[OFFLOAD]
    in_tiles = [mixture.longest[way] for way in WAYS_IN_TILES]
    assert mixture.longest[OFFLOAD] < in_tiles[0] < in_tiles[1] < in_tiles[2]
    assert mixture.positions == 40_960


def test_tiles_are_told_where_the_other_ways_do_not_reach_the_models_positions(planner):
    llama = replace(planner.recipe, model=ModelSpec("meta-llama/Meta-Llama-3-8B-Instruct"))  # 8,192 positions
    larger = Planner(llama, CARD)
    report = build_report(larger, larger.exact(1, Policy(32, offload=True))[0])
    assert report.longest[OFFLOAD] > 8192 and list(report.longest) == [EVERY_LAYER, OFFLOAD]


def test_the_text_names_the_choice_the_card_and_the_longest_row(mixture):
    text = mixture.text()
    assert max(map(len, text.splitlines())) <= TEXT_WIDTH
    assert "the first 33 of 40 layers recompute" in text
    assert f"peak on {CARD.name}" in text and "GiB for the step" in text
    assert f"{mixture.longest[OFFLOAD]:,} tokens" in text and "40,960 positions" in text
    # The inputs of 40 layers, 5,120 numbers in 16 bits a token
    for way in WAYS_IN_TILES:
        waits = 40 * 2 * 5120 * mixture.longest[way] / GIB
        assert f"{mixture.longest[way]:,} tokens, {waits:.1f} GiB in host memory" in text
    assert "in a micro-batch of 1 row, as one example" in text
    assert "counted for rows of up to 32 examples; a run counts again where its data have more in a row" in text
    assert "modelled, not measured: RTX 4090" in text and "4-bit weights" in text


def test_the_text_says_why_it_was_chosen(planner, mixture):
    over = (mixture.row(NO_CHECKPOINTING).peak - CARD.size) / GIB
    assert f"why: the fastest that fits; without checkpointing it would be {over:.1f} GiB over" in mixture.text()
    kept = replace(mixture, plan=replace(mixture.plan, checkpointing=Policy(40, 40)))
    assert "no layer needs to recompute" in kept.text()
    train = replace(mixture.recipe.train, checkpointing="offload")
    assert "checkpointing='offload'" in replace(mixture, recipe=replace(mixture.recipe, train=train)).text()


def test_weights_of_16_bits_are_called_so(mixture):
    model = replace(mixture.recipe.model, bits=16)
    assert "\n16-bit weights" in replace(mixture, recipe=replace(mixture.recipe, model=model)).text()


def test_a_row_longer_than_the_model_reaches_is_marked(mixture):
    assert "more than the model's positions" not in replace(mixture, positions=1 << 20).text()
    longer = [tokens > 20_000 for tokens in mixture.longest.values()]
    assert 0 < sum(longer) < len(longer) == 5
    assert replace(mixture, positions=20_000).text().count("more than the model's positions") == sum(longer)


def test_a_model_that_leaves_no_room_for_a_row_has_no_longest_row(mixture):
    assert "none" in replace(mixture, longest={EVERY_LAYER: 0}).text().splitlines()[-1]


def test_the_json_holds_the_same_bytes(mixture, values):
    assert [row["peak_on_card_bytes"] for row in values["table"]] == [row.peak for row in mixture.rows]
    assert [list(row["parts_bytes"].values()) for row in values["table"]] == [
        list(row.parts.values()) for row in mixture.rows
    ]
    card = values["card"]
    assert card["size_bytes"] - sum(card["unseen_bytes"].values()) == card["budget_bytes"] == CARD.budget
    assert {row["name"]: row["tokens"] for row in values["longest_rows"]} == mixture.longest


def test_the_json_holds_the_choice(mixture, values):
    choice = values["choice"]
    assert (choice["micro_batch_rows"], choice["accumulation"], choice["processes"]) == (1, 16, 1)
    assert (choice["kept_layers"], choice["recomputed_layers"], choice["offload"]) == (7, 33, True)
    assert choice["predicted_peak_on_card_bytes"] == mixture.row(CHOICE).peak
    # Both count the workspaces; the allocator does not see the context, the kernels and the reserve.
    unseen = values["card"]["unseen_bytes"]
    outside = unseen["cuda_context"] + unseen["cuda_kernels"] + unseen["reserve"]
    assert choice["predicted_peak_on_card_bytes"] - choice["predicted_peak_allocated_bytes"] == outside


def test_the_json_says_what_it_was_made_from(values):
    assert values["recipe"]["model"]["name"] == "Qwen/Qwen3-14B"
    assert set(values["versions"]) == {"torch", "transformers", "peft", "bitsandbytes"}
    assert values["speed"]["name"] == "RTX 4090"


def test_the_curve_keeps_the_peak_and_the_whole_time(mixture):
    for row in mixture.rows:
        times, kinds = curve(row.step, mixture.speed)
        assert max(sum(now) for now in zip(*kinds, strict=True)) * GIB == pytest.approx(row.step.peak())
        assert times == sorted(times) and len(times) <= POINTS + 2  # the beginning and the end
        assert times[-1] == pytest.approx(1e3 * row.step.seconds(mixture.speed))
        assert sum(phases(row.step, mixture.speed).values()) == pytest.approx(times[-1])


@pytest.mark.parametrize("kept", (7, 40))
def test_the_picture_is_a_png(planner, mixture, kept, tmp_path):
    # Where no layer recomputes, every layer that does stands beside it.
    chosen = mixture if kept == 7 else build_report(planner, planner.exact(1, Policy(40, 40))[0])
    draw_plan(chosen, tmp_path / "plan.png")
    content = (tmp_path / "plan.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 20_000
    assert struct.unpack(">II", content[16:24]) == (1690, 780)  # 13 x 6 inches of 130 pixels


def test_the_name_of_a_model_is_no_formula(mixture, tmp_path):
    model = replace(mixture.recipe.model, name="my $model_$ {x")
    draw_plan(replace(mixture, recipe=replace(mixture.recipe, model=model)), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 20_000


@pytest.mark.parametrize("write", (write_json, draw_plan))
def test_a_folder_that_is_not_there_is_named(mixture, write, tmp_path):
    with pytest.raises(UserError, match="nowhere/plan cannot be written: No such file or directory") as error:
        write(mixture, tmp_path / "nowhere" / "plan")
    assert "\n" not in str(error.value)
