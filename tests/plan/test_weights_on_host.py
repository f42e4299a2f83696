"""The plan's third lever: how many layers' frozen weights wait in host memory."""

import weakref
from dataclasses import replace

import pytest
import torch

from common.machine.device import GIB
from common.machine.host_memory import page_locked_bytes
from common.machine.layout import RING_SLOTS, Layout, spread_layers
from common.model.activation_checkpointing import Policy, decoder_layers
from common.model.attention import PACKED_ATTENTION
from common.model.host_embedding import use_host_embedding
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.model.weight_streaming import stream_weights, streamed_tensors, weight_ring
from common.plan import ledger
from common.plan import planner as planner_module
from common.plan.card import Card
from common.plan.forecast import Forecast, Setting
from common.plan.ledger import round_up
from common.plan.machine_plan import plan_for_card
from common.plan.misfit import choose_or_explain
from common.plan.plan import choose_option, make_plan
from common.plan.report import CHOICE, EVERY_LAYER, build_report
from common.plan.speed import KNOWN_GPUS
from common.plan.step import EMBEDDINGS, WEIGHTS
from common.recipe import LoraSpec, ModelSpec, TrainSpec, UserError
from tests.conftest import FP32, MIXED
from tests.plan.planners import LLAMA, QWEN, RECIPE, edited, plan_for, planner_for
from tests.plan.test_count import LAYERS, LONG_ROWS, POLICIES, allocated_in_a_real_step, forecasts, recipe_for

LLAMA_70B = "meta-llama/Meta-Llama-3-70B-Instruct"
# Of a layer of Llama 3 8B: 218,103,808 weights in half a byte, their scales in a byte a block of 64, and the scales'
# scales in 4 bytes a block of 256 of those.
BLOCK = 218_103_808 // 2 + 218_103_808 // 64 + 218_103_808 // 64 // 256 * 4

__all__ = ["forecasts"]  # the fixture of test_count


@pytest.fixture(scope="module")
def llama():
    return Forecast(RECIPE)


def test_the_card_holds_a_ring_and_the_host_every_layer_that_streams(llama):
    policy = Policy(32)
    whole, streamed = llama.step(2048, policy), llama.step(2048, policy, on_host=20)
    assert whole.streamed_per_layer == whole.streamed_at_most == BLOCK
    assert whole.resident[WEIGHTS] - streamed.resident[WEIGHTS] == (20 - RING_SLOTS) * BLOCK
    assert whole.peak() - streamed.peak() == (20 - RING_SLOTS) * BLOCK
    assert streamed.host_peak() - whole.host_peak() == 20 * page_locked_bytes(BLOCK) == 20 * BLOCK
    # In forward and in backward those come that do not lie in the ring already.
    assert streamed.link_bytes() - whole.link_bytes() == pytest.approx(2 * (20 - RING_SLOTS) * BLOCK)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kernels", ["lean", pytest.param("stock", marks=pytest.mark.slow)])
def test_the_count_is_what_the_allocator_gives_out_in_a_step_whose_weights_stream(
    forecasts, policy, kernels, monkeypatch
):
    monkeypatch.setattr(ledger, "EMPTY_ON_HOST", None)  # on a CPU host memory is an allocation like any other
    forecast = forecasts["llama", kernels]
    step = forecast.step(768, POLICIES[policy], on_host=LAYERS)
    counted = step.peak() - sum(step.resident.values())
    real = allocated_in_a_real_step(forecast.recipe, POLICIES[policy], on_host=LAYERS)
    print(f"{policy}, {kernels}: {counted / 2**20:.2f} MiB counted, {counted / real:.4f} of the real")
    assert counted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("policy", ["tiles, offload", "by head"])
def test_the_count_is_what_the_allocator_gives_out_where_tiles_stream_too(forecasts, policy, monkeypatch):
    monkeypatch.setattr(ledger, "EMPTY_ON_HOST", None)  # on a CPU host memory is an allocation like any other
    recipe = forecasts["llama", "lean"].recipe
    forecast = Forecast(recipe, Setting(torch.float32, PACKED_ATTENTION, triton=False))
    step = forecast.step(768, LONG_ROWS[policy], on_host=LAYERS)
    counted = step.peak() - sum(step.resident.values())
    real = allocated_in_a_real_step(recipe, LONG_ROWS[policy], on_host=LAYERS, attention=PACKED_ATTENTION)
    print(f"{policy}: {counted / 2**20:.2f} MiB counted, {counted / real:.4f} of the real")
    assert counted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("on_host", [3, LAYERS])
def test_the_count_of_what_stays_is_what_a_model_holds(forecasts, on_host):
    forecast = forecasts["llama", "lean"]
    model = load_4bit(forecast.recipe.model, FP32)
    chosen = [decoder_layers(model)[index] for index in spread_layers(on_host, LAYERS)]
    before = [
        weakref.ref(getattr(tensor.owner, tensor.name).untyped_storage())
        for layer in chosen
        for tensor in streamed_tensors(layer)[0]
    ]
    given_back = sum(round_up(storage().nbytes()) for storage in before)
    stream_weights(model, on_host)
    assert not any(storage() for storage in before)
    ring = weight_ring(model)
    whole, streamed = (forecast.step(768, Policy(LAYERS), on_host=count).resident[WEIGHTS] for count in (0, on_host))
    assert whole - streamed == given_back - sum(slot.nbytes for slot in ring.slots)
    assert sum(block.nbytes for block in ring.blocks) == given_back


def test_a_checkpoint_of_several_sizes_has_a_ring_for_its_largest_layer(four_bit):
    step = Forecast(recipe_for(str(four_bit(**MIXED)))).step(256, Policy(4))
    model = load_4bit(ModelSpec(str(four_bit(**MIXED))), FP32)
    stream_weights(model, 4)
    ring = model.model.layers[0].weight_ring
    assert step.streamed_at_most >= ring.slots[0].nbytes / 2  # the plan's 16-bit weights have 2 bytes, these here 4
    assert step.streamed_at_most > step.streamed_per_layer


def test_nothing_streams_where_one_row_fits_without():
    chosen = plan_for(RECIPE, 8)
    assert chosen.layout == Layout()
    assert chosen == plan_for(edited(weights_on_host=0), 8)


@pytest.mark.parametrize("gib", [6, 4])
def test_where_nothing_fits_the_fastest_that_streams_is_taken_and_it_fits(gib):
    shared = planner_for(RECIPE, gib)
    option = choose_or_explain(shared)
    assert option.on_host > RING_SLOTS
    assert option.peak + shared.card.overhead_bytes <= gib * GIB
    fewer, _ = shared.exact(option.rows, option.policy, option.on_host - 1)
    assert not shared.fits(fewer)
    for rows in (1, 2, 4):
        for policy in (Policy(32), Policy(32, offload=True), Policy(32, 8, offload=True)):
            other, _ = shared.exact(rows, policy, 32)
            # of options that take about as long the one is taken that sends least
            assert not shared.fits(other) or option.seconds_per_token <= 1.021 * other.seconds_per_token
    text = plan_for(RECIPE, gib).text
    assert f"the weights of {option.on_host} layers stream from host memory" in text
    assert "cross the link in a micro-batch" in text


def test_a_number_is_obeyed_and_zero_refuses():
    chosen = plan_for(edited(weights_on_host=16), 24)
    assert chosen.layout == Layout(on_host=16)
    with pytest.raises(UserError, match="does not fit a card of 6 GiB"):
        plan_for(edited(weights_on_host=0), 6)


@pytest.mark.parametrize("number", [-1, 1, 2])
def test_a_number_that_saves_nothing_is_refused(number):
    with pytest.raises(UserError, match=f'weights_on_host is {number}; give "auto", 0, or 3 and more'):
        edited(weights_on_host=number)
    with pytest.raises(UserError, match="'none'; give"):
        edited(weights_on_host="none")


def test_more_layers_than_the_model_has_are_refused():
    with pytest.raises(UserError, match="weights_on_host is 33, and the model has 32 layers"):
        planner_for(edited(weights_on_host=33), 24)
    tiny = replace(RECIPE, model=ModelSpec("models/tiny"), card_gib=None)
    with pytest.raises(UserError, match="weights_on_host is 5, and the model has 4 layers"):
        plan_for_card(replace(tiny, train=TrainSpec(256, 16, 1e-3, weights_on_host=5)))
    assert plan_for_card(replace(tiny, train=TrainSpec(256, 16, 1e-3, weights_on_host=4))).layout.streamed == 4


def test_layers_that_are_shared_out_and_stream_are_refused():
    with pytest.raises(UserError, match="weights_on_host is 8, of layers that are whole, and sharding='always'"):
        edited(weights_on_host=8, sharding="always")


def test_host_memory_is_a_limit_of_streaming_too():
    needed = planner_for(RECIPE, 4).choose().host_bytes
    assert planner_for(RECIPE, 4, host_bytes=needed).choose().on_host > 0
    with pytest.raises(UserError, match=r"do not fit the host memory: .* are available"):
        choose_or_explain(planner_for(RECIPE, 4, host_bytes=GIB))


def test_a_misfit_without_streaming_names_it():
    with pytest.raises(UserError, match="TrainSpec.weights_on_host='auto'"):
        plan_for(edited(weights_on_host=0), 6)
    with pytest.raises(UserError, match="TrainSpec.weights_on_host='auto'"):
        plan_for(edited(weights_on_host=0), 4)


def test_the_cards_of_a_machine_share_the_weights_that_wait_in_its_memory():
    alone, one_of_two = (planner_for(RECIPE, 24, Layout(2), cards=cards) for cards in (1, 2))
    policy = Policy(32, offload=True)
    apart, shared = (planner.exact(1, policy, 32)[0].host_bytes for planner in (alone, one_of_two))
    pages = -(-BLOCK // 4096) * 4096
    assert apart - shared == 32 * BLOCK - 32 * pages // 2
    text = make_plan(one_of_two, one_of_two.exact(1, policy, 32)[0]).text
    assert "the weights of 32 of 32 layers wait in host memory, once for the 2 cards of a machine" in text


@pytest.mark.slow  # counts of sharded layers, and of data parallel ones
@pytest.mark.parametrize(("gib", "link", "embedding", "taken"), [(6, 25e9, "auto", "whole"), (5, 4e9, False, "shards")])
def test_several_cards_stream_whole_layers_or_share_them_out_whichever_is_faster(
    gib, link, embedding, taken, monkeypatch
):
    """Shards are faster where a link is slow and the embedding stays on the card: of a layer only a part is sent."""
    monkeypatch.setattr(planner_module, "speed_of", lambda _: replace(KNOWN_GPUS[0], link_bytes_per_second=link))
    card = replace(Card.of_size(gib), cards=2)
    recipe, whole_recipe, shards_recipe = (
        edited(sharding=sharding, embedding_on_host=embedding) for sharding in ("auto", "never", "always")
    )
    planner, option = choose_option(recipe, card, None, 2)
    whole, shards = (choose_option(fixed, card, None, 2)[1] for fixed in (whole_recipe, shards_recipe))
    assert whole.on_host > RING_SLOTS
    assert planner.layout.sharded == (taken == "shards")
    best, other = (shards, whole) if planner.layout.sharded else (whole, shards)
    assert option == replace(best, instead=option.instead)
    assert best.seconds_per_token <= 1.02 * other.seconds_per_token
    text = make_plan(planner, option).text
    times = [f"{option.seconds_per_token * 2048 * 8:.1f} s" for option in (whole, shards)]
    assert f"whole layers that stream: {times[0]} a step" in text and f"(FSDP2): {times[1]} and" in text
    assert ("the parts are faster" in text) == planner.layout.sharded
    assert "each card with a link of its own to the host and to other cards, and no NVLink" in text


@pytest.mark.slow  # counts of sharded layers, and of data parallel ones
def test_of_several_cards_those_stream_that_cannot_share_the_layers_out():
    dora = replace(RECIPE, lora=LoraSpec(16, 16, dora=True))
    planner, option = choose_option(dora, Card.of_size(8), None, 2)
    assert planner.layout == Layout(2) and option.on_host > RING_SLOTS
    assert "sharded over the cards are no choice: LoraSpec.dora" in make_plan(planner, option).text
    planner, option = choose_option(edited(weights_on_host=32), Card.of_size(6), None, 2)
    assert (planner.layout.sharded, option.on_host, option.instead) == (False, 32, "")


@pytest.mark.parametrize("name", [LLAMA, pytest.param(QWEN, marks=pytest.mark.slow), LLAMA_70B])
@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("offload", [False, True])
def test_by_the_model_of_time_copies_hide_behind_2048_tokens_and_more(name, tokens, offload):
    forecast = Forecast(replace(RECIPE, model=ModelSpec(name)))
    policy = Policy(forecast.layers, offload=offload)
    on_card, streamed = (
        forecast.step(tokens, policy, on_host=count).seconds(forecast.speed, 16) for count in (0, forecast.layers)
    )
    print(f"{name}, {tokens}: {streamed / on_card:.3f}")
    assert streamed <= 1.05 * on_card


def test_short_rows_show_the_copies_and_the_plan_takes_more_rows_at_a_time(llama):
    one, four = (llama.step(tokens, Policy(32), on_host=32) for tokens in (256, 2048))
    assert one.seconds(llama.speed) / 256 > 1.5 * four.seconds(llama.speed) / 2048
    option = planner_for(edited(seq_len=256), 5).choose()
    assert option.on_host > 0 and option.rows * 256 >= 2048


def test_the_report_shows_the_lever_beside_plans_without_it():
    shared = planner_for(RECIPE, 6)
    report = build_report(shared, choose_or_explain(shared))
    text = report.text()
    on_host = report.plan.layout.on_host
    (line,) = [line for line in text.splitlines() if line.startswith("the embedding lies in")]
    assert line.split()[-5:] == ["card", "card", "card", "host", "memory"]
    (line,) = [line for line in text.splitlines() if line.startswith("layers whose weights stream")]
    assert line.split()[-12:] == ["0", "of", "32"] * 3 + [str(on_host), "of", "32"]
    assert report.row(EVERY_LAYER).parts[WEIGHTS] > report.row(CHOICE).parts[WEIGHTS]
    assert not report.row(EVERY_LAYER).fits and report.row(CHOICE).fits
    # As in docs/memory.md, where the smallest card is 8 GiB.
    assert "with all weights on the card the leanest policy of those below would be 1." in text
    assert max(map(len, text.splitlines())) <= 120
    shared = planner_for(RECIPE, 24)
    assert "stream" not in build_report(shared, choose_or_explain(shared)).text()


EMBEDDING = 128_256 * 4096 * 2  # Llama 3 8B's, in 16 bits


def test_an_embedding_on_the_host_takes_its_bytes_there_and_sends_a_row_a_token(llama):
    policy = Policy(32)
    moved = llama.with_embedding(on_host=True)
    for on_host in (0, 20):
        card, host = (forecast.step(2048, policy, on_host=on_host) for forecast in (llama, moved))
        assert card.resident[EMBEDDINGS] - host.resident[EMBEDDINGS] == EMBEDDING
        assert card.peak() - host.peak() == EMBEDDING
        assert host.link_bytes() - card.link_bytes() == 2048 * 4096 * 2
        # 16 MiB of rows are gathered before they are sent
        assert host.host_peak() - card.host_peak() == page_locked_bytes(EMBEDDING) + page_locked_bytes(16 << 20)
        assert host.host_peak() - card.host_peak() == EMBEDDING + (16 << 20)


@pytest.mark.parametrize("on_host", [0, LAYERS])
def test_the_count_is_what_the_allocator_gives_out_with_the_embedding_on_the_host(forecasts, on_host, monkeypatch):
    monkeypatch.setattr(ledger, "EMPTY_ON_HOST", None)  # on a CPU host memory is an allocation like any other
    forecast = forecasts["llama", "lean"].with_embedding(on_host=True)
    step = forecast.step(768, POLICIES["some layers"], on_host=on_host)
    counted = step.peak() - sum(step.resident.values())
    real = allocated_in_a_real_step(forecast.recipe, POLICIES["some layers"], on_host=on_host, embedding_on_host=True)
    print(f"{counted / real:.4f} of the real")
    assert counted == pytest.approx(real, rel=0.02)
    model = attach_lora(load_4bit(forecast.recipe.model, FP32), forecast.recipe.lora)
    before = weakref.ref(model.get_input_embeddings().weight.untyped_storage())
    assert round_up(before().nbytes()) == forecast.embedding_bytes
    use_host_embedding(model)
    assert before() is None  # given back


def test_the_embedding_goes_first_and_alone_where_that_is_enough():
    shared = planner_for(RECIPE, 7)
    chosen = make_plan(shared, choose_or_explain(shared))
    assert chosen.layout == Layout(embedding_on_host=True)
    assert "the rows of the embedding come from host memory" in chosen.text
    shared.recipe = edited(embedding_on_host=False)
    kept = shared.choose()
    assert kept.on_host > RING_SLOTS and not kept.embedding_on_host
    shared.recipe, shared.card = edited(embedding_on_host=False, weights_on_host=16), Card.of_size(5)
    with pytest.raises(UserError, match="TrainSpec.embedding_on_host='auto'"):
        choose_or_explain(shared)
    shared.recipe = edited(weights_on_host=16)
    assert shared.choose().on_host == 16 and shared.choose().embedding_on_host
    shared.recipe = RECIPE
    option = shared.choose()
    assert option.embedding_on_host and option.on_host
    text = make_plan(shared, option).text
    assert "stream from host memory, and the rows of the embedding" in text
    assert "the embedding waits in host memory (0.98 GiB)" in text
    shared.recipe = edited(embedding_on_host=False)
    without = shared.choose()
    assert option.on_host < without.on_host or option.seconds_per_token < without.seconds_per_token


def test_an_embedding_that_is_to_wait_does_where_all_would_fit():
    assert plan_for(edited(embedding_on_host=True), 24).layout == Layout(embedding_on_host=True)


def test_an_embedding_that_is_the_head_too_stays_on_the_card():
    tied = replace(RECIPE, model=ModelSpec("HuggingFaceTB/SmolLM2-135M-Instruct"))
    planner = planner_for(tied, 24)
    assert planner.leaner() is planner
    asked = replace(tied, train=replace(tied.train, embedding_on_host=True), card_gib=None)
    with pytest.raises(UserError, match=r"the embedding of HuggingFaceTB/SmolLM2-135M-Instruct is its head too"):
        planner_for(asked, 24)
    with pytest.raises(UserError, match="is its head too"):
        plan_for_card(asked)


def test_bad_words_for_the_embedding_are_refused():
    with pytest.raises(UserError, match="embedding_on_host is 'host'; give \"auto\", True or False"):
        edited(embedding_on_host="host")
    with pytest.raises(UserError, match="with sharding='always' the embedding stays on each card"):
        edited(embedding_on_host=True, sharding="always")
    assert planner_for(RECIPE, 24, Layout(2, sharded=True)).leaner().layout == Layout(2, sharded=True)


def test_too_little_host_memory_for_the_embedding_names_the_card_that_would_do():
    with pytest.raises(UserError, match="the embedding and the layers' inputs do not fit the host memory: .* a card"):
        choose_or_explain(planner_for(RECIPE, 4, host_bytes=3 * GIB))
