"""The count: against torch's allocator in a real step, against arithmetic, and of an encoder."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertModel

from common.data.batches import collate
from common.machine.device import GIB
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy, checkpoint_activations
from common.model.attention import PACKED_ATTENTION
from common.model.held_adapters import held_adapters
from common.model.host_embedding import use_host_embedding
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.model.optimizer import build_optimizer
from common.model.preference_loss import answer_likelihoods, preference_loss
from common.model.weight_streaming import stream_weights
from common.plan import ledger, operators
from common.plan.count import count_step
from common.plan.forecast import Forecast, Setting, preference_entries
from common.plan.ledger import round_up
from common.plan.splice import Part, layers_to_copy, splice_layers
from common.plan.step import (
    ADAPTERS,
    EMBEDDINGS,
    GRADIENTS,
    OPTIMIZER,
    SAVED,
    WEIGHTS,
    WORKING,
    Step,
)
from common.recipe import (
    PREFERENCE_DEFAULTS,
    DataSpec,
    Kernels,
    LoraSpec,
    ModelSpec,
    Optimizer,
    PreferenceSpec,
    Recipe,
    TrainSpec,
)
from tests import flash_on_cpu  # noqa: F401  (gives the CPU flash attention's operators)
from tests.allocations import peak_in, watched_allocations
from tests.conftest import ARCHITECTURES, FP32

LLAMA, QWEN3 = "meta-llama/Meta-Llama-3-8B-Instruct", "Qwen/Qwen3-14B"
RANK_16 = LoraSpec(16, 16)
LLAMA_ADAPTER = 32 * 16 * 81_920  # layers * rank * (in + out over 7 projections)
TOKENS, LAYERS = 768, 6
EXAMPLES = TOKENS // 64  # as a plan assumes
POLICIES = {
    "every layer": Policy(LAYERS),
    "some layers": Policy(LAYERS, 2),
    "keep attention": Policy(LAYERS, keep_attention=True),
    "none": Policy(LAYERS, LAYERS),
    "offload": Policy(LAYERS, offload=True),
    "all at once": Policy(LAYERS, 2, keep_attention=True, offload=True),
}
FEWER = ("every layer", "some layers", "keep attention")


def recipe_for(
    name: str,
    *,
    lora: LoraSpec = RANK_16,
    layers: int | None = None,
    bits: int = 4,
    optimizer: Optimizer = "adamw_torch_fused",
    kernels: Kernels = "lean",
) -> Recipe:
    model = ModelSpec(name, weights="pretrained" if layers is None else "random", layers=layers, bits=bits)
    return Recipe(model, DataSpec("x"), lora, TrainSpec(2048, 16, 2e-4, optimizer=optimizer, kernels=kernels))


@pytest.fixture(scope="module")
def forecasts(small_model):
    """Of models that are large enough for their activations to outweigh what torch allocates beside."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": LAYERS}
    sizes["sliding_window_pattern"] = LAYERS  # of Gemma: of these layers only the last one sees everything
    folders = {name: str(small_model(name, initializer_range=0.05, **sizes)) for name in ARCHITECTURES}
    setting = Setting(torch.float32, "sdpa", triton=False)  # on a CPU the operators run as their references
    return {
        (name, kernels): Forecast(recipe_for(folder, lora=LoraSpec(8, 16), kernels=kernels), setting)
        for name, folder in folders.items()
        for kernels in ("lean", "stock")
    }


def allocated_in_a_real_step(
    recipe: Recipe,
    policy: Policy,
    tokens: int = TOKENS,
    rows: int = 1,
    on_host: int = 0,
    attention: str = "sdpa",
    examples: int = EXAMPLES,
    *,
    embedding_on_host: bool = False,
) -> int:
    """Bytes that torch's allocator has given out beyond what was there, at the worst moment of an optimizer step.

    rows: of the micro-batch, each as long as the others, in which the tokens lie. on_host: layers whose weights stream.
    embedding_on_host: the embedding waits there too.
    """
    model = attach_lora(load_4bit(recipe.model, FP32), recipe.lora)
    use_lean_layers(model, recipe.train.kernels)
    model.set_attn_implementation(attention)
    stream_weights(model, on_host)
    if embedding_on_host:
        use_host_embedding(model)
    checkpoint_activations(model, policy)
    model.train()
    optimizer = build_optimizer(model, recipe.train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # of earlier micro-batches
    optimizer.step()  # makes its states
    length = tokens // rows
    batch = packed_row(length, examples) if attention == PACKED_ATTENTION else several_examples_a_row(length, rows)
    if recipe.preference is not None:
        batch |= preference_entries(batch["labels"].shape, recipe.preference, examples)
    held = held_adapters(model)  # as the trainer
    with torch.no_grad():
        held.hold()
        answer_likelihoods(model, batch) if recipe.preference else model(**batch)  # of an earlier micro-batch
    with watched_allocations() as profiler:
        if recipe.preference is None:
            model(**batch, num_items_in_batch=tokens).loss.backward()
        else:
            preference_loss(model, batch, recipe.preference).loss.backward()
        held.release()
        torch.nn.utils.clip_grad_norm_(trained, recipe.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return peak_in(profiler)


def several_examples_a_row(length: int, rows: int) -> dict[str, Any]:
    """A micro-batch whose attention needs a mask, every token trained, as a plan counts."""
    row = {"input_ids": [0] * length, "labels": [0] * length, "seq_lengths": [length // 4] * 4}
    batch = collate([row] * rows, pad_token_id=0)
    return batch | {"trained_positions": torch.zeros(length * rows, dtype=torch.int64)}


def packed_row(length: int, examples: int) -> dict[str, Any]:
    """A micro-batch of packed attention with so many examples, every token trained."""
    lengths = [length // examples] * (examples - 1)
    row = {"input_ids": [0] * length, "labels": [0] * length, "seq_lengths": [*lengths, length - sum(lengths)]}
    batch = collate([row], pad_token_id=0, padding_free=True)
    return batch | {"trained_positions": torch.zeros(length, dtype=torch.int64)}


def cases() -> Iterator[Any]:
    """Architecture, policy and layers; the stock layers of three of the architectures are slow tests."""
    for name in ARCHITECTURES:
        every_policy = name in ("llama", "qwen3")
        yield from ((name, policy, "lean") for policy in (POLICIES if every_policy else FEWER))
        for policy in FEWER if every_policy else FEWER[:1]:
            yield pytest.param(name, policy, "stock", marks=[] if name == "llama" else pytest.mark.slow)


@pytest.mark.parametrize(("architecture", "policy", "kernels"), list(cases()))
def test_the_count_is_what_the_allocator_gives_out_in_a_real_step(
    forecasts, architecture, policy, kernels, monkeypatch
):
    monkeypatch.setattr(ledger, "EMPTY_ON_HOST", None)  # on a CPU host memory is an allocation like any other
    forecast = forecasts[architecture, kernels]
    step = forecast.step(TOKENS, POLICIES[policy])
    counted = step.peak() - sum(step.resident.values())
    real = allocated_in_a_real_step(forecast.recipe, POLICIES[policy])
    print(f"{architecture}, {policy}, {kernels}: {counted / 2**20:.2f} MiB counted, {counted / real:.4f} of the real")
    assert counted == pytest.approx(real, rel=0.02)


@pytest.fixture(scope="module")
def preference_forecasts(forecasts):
    """Of the small Llama, for each loss that learns from better and worse answers."""
    recipe, setting = forecasts["llama", "lean"].recipe, forecasts["llama", "lean"].setting
    return {loss: Forecast(replace(recipe, preference=PreferenceSpec(loss)), setting) for loss in PREFERENCE_DEFAULTS}


def preference_cases() -> Iterator[Any]:
    """Every policy with DPO, every other loss with one that does both; the others of each loss are slow tests."""
    for loss in PREFERENCE_DEFAULTS:
        for policy in POLICIES:
            fast = loss == "dpo" or policy == "some layers"
            yield pytest.param(loss, policy, marks=[] if fast else pytest.mark.slow)  # 20 of them, 1.5 s each


@pytest.mark.parametrize(("loss", "policy"), list(preference_cases()))
def test_a_step_that_learns_from_preferences_is_counted_as_it_runs(preference_forecasts, loss, policy, monkeypatch):
    monkeypatch.setattr(ledger, "EMPTY_ON_HOST", None)  # on a CPU host memory is an allocation like any other
    forecast = preference_forecasts[loss]
    step = forecast.step(TOKENS, POLICIES[policy])
    counted = step.peak() - sum(step.resident.values())
    real = allocated_in_a_real_step(forecast.recipe, POLICIES[policy])
    print(f"{loss}, {policy}: {counted / 2**20:.2f} MiB counted, {counted / real:.4f} of the real")
    assert counted == pytest.approx(real, rel=0.02)


def allocated_in_a_real_forward(recipe: Recipe, rows: int) -> int:
    """As allocated_in_a_real_step, of a forward pass without gradients, with the log-likelihood of each answer."""
    model = attach_lora(load_4bit(recipe.model, FP32), recipe.lora)
    use_lean_layers(model, recipe.train.kernels)
    checkpoint_activations(model, Policy(LAYERS))
    model.eval()
    batch = several_examples_a_row(TOKENS // rows, rows)
    batch |= preference_entries(batch["labels"].shape, recipe.preference, EXAMPLES)
    with torch.no_grad(), watched_allocations() as profiler:
        answer_likelihoods(model, batch)
    return peak_in(profiler)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_pass_without_gradients_is_counted_as_it_runs(preference_forecasts, rows):
    forecast = preference_forecasts["dpo"]
    step = forecast.forward(TOKENS, rows=rows)
    counted = step.peak() - sum(step.resident.values())
    real = allocated_in_a_real_forward(forecast.recipe, rows)
    print(f"{rows} rows: {counted / 2**20:.2f} MiB counted, {counted / real:.4f} of the real")
    assert counted == pytest.approx(real, rel=0.02)


LONG_ROWS = {
    "tiles": Policy(LAYERS, tile=128),
    "tiles, offload": Policy(LAYERS, tile=128, offload=True),
    "by head": Policy(LAYERS, tile=128, by_head=True),
    "by head, keep attention": Policy(LAYERS, tile=128, by_head=True, keep_attention=True),
    "by head, offload": Policy(LAYERS, tile=160, by_head=True, offload=True),  # the last tile is shorter
    "q, k, v again, offload": Policy(LAYERS, tile=128, by_head=True, qkv_again=True, offload=True),
}


@pytest.mark.parametrize("examples", [1, EXAMPLES])
@pytest.mark.parametrize("policy", LONG_ROWS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_long_rows_in_tiles_are_counted_as_they_run(forecasts, architecture, policy, examples, monkeypatch):
    monkeypatch.setattr(ledger, "EMPTY_ON_HOST", None)  # on a CPU host memory is an allocation like any other
    recipe = forecasts[architecture, "lean"].recipe
    forecast = Forecast(recipe, Setting(torch.float32, PACKED_ATTENTION, triton=False))
    step = forecast.step(TOKENS, LONG_ROWS[policy], examples=examples)
    counted = step.peak() - sum(step.resident.values())
    real = allocated_in_a_real_step(recipe, LONG_ROWS[policy], attention=PACKED_ATTENTION, examples=examples)
    print(f"{architecture}, {policy}: {counted / 2**20:.2f} MiB counted, {counted / real:.4f} of the real")
    assert counted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("policy", ["every layer", "none"])
def test_a_rectangle_of_rows_is_counted_as_it_runs(forecasts, policy, monkeypatch):
    """Its mask is rows x length x length, a third of what a single row of as many tokens has."""
    monkeypatch.setattr(ledger, "EMPTY_ON_HOST", None)  # on a CPU host memory is an allocation like any other
    forecast = forecasts["llama", "lean"]
    step, one_row = (forecast.step(TOKENS, POLICIES[policy], rows=rows) for rows in (3, 1))
    counted = step.peak() - sum(step.resident.values())
    real = allocated_in_a_real_step(forecast.recipe, POLICIES[policy], rows=3)
    print(f"{policy}: {counted / 2**20:.2f} MiB counted, {counted / real:.4f} of the real")
    assert counted == pytest.approx(real, rel=0.005)
    masks = LAYERS if policy == "none" else 1  # in fp32, of each layer that keeps its activations or recomputes
    assert one_row.peak() - step.peak() >= masks * 4 * (TOKENS**2 - 3 * (TOKENS // 3) ** 2)


def test_attention_with_a_mask_computes_all_pairs_and_sums_its_gradients_in_fp32():
    rows, heads, length, dim = 2, 32, 2048, 128
    states = torch.empty((rows, heads, length, dim), dtype=torch.float16, device="meta")
    scratch = operators.SCRATCH_BYTES[operators.SDPA_BACKWARD]
    # dq and a number a token and head; 200 times 64 rows of dk and dv
    assert scratch(states, states) == 4 * rows * heads * length * (dim + 1) + 200 * 64 * dim * 2 * 4
    assert scratch(states.float(), states.float()) == 0
    forecast = Forecast(recipe_for(LLAMA, layers=3), Setting(torch.float16, "sdpa"))
    whole, halves = (forecast.count(rows * length, Policy(3, 3), True, n).segment("forward 1") for n in (1, rows))
    # Two matmuls of all pairs: a row of twice the length has twice as many as two of half of it.
    pairs = (rows * length) ** 2 - rows * length**2
    assert whole.work.flops - halves.work.flops == 4 * heads * dim * pairs


@pytest.fixture(scope="module")
def two_layers():
    return Forecast(recipe_for(LLAMA, layers=2))


def test_a_count_is_repeatable(two_layers):
    first, second = (two_layers.count(256, Policy(2, 1), True) for _ in range(2))
    assert first.resident_outside_layers == second.resident_outside_layers
    assert first.resident_per_layer == second.resident_per_layer
    assert (first.peak(), first.at_peak()) == (second.peak(), second.at_peak())
    for one, other in zip(first.segments, second.segments, strict=True):
        # Sorted: autocast drops its copies of the adapters in the order of their addresses.
        assert (one.name, sorted(one.events)) == (other.name, sorted(other.events))
        assert (one.host_bytes, one.work.operators) == (other.host_bytes, other.work.operators)


def test_the_peak_is_made_up_of_its_kinds(two_layers):
    step = two_layers.step(256, Policy(2, 1))
    assert sum(step.at_peak().values()) == step.peak()
    assert step.at_peak()[SAVED] > 0 and step.at_peak()[WORKING] > 0


def test_after_a_step_there_is_what_was_there_before(two_layers):
    for policy in (Policy(2, 2), Policy(2), Policy(2, offload=True)):
        step = two_layers.count(256, policy, True)
        # Only the batch is left, which enters the count when the step first looks at it: ids, labels and positions.
        assert sum(segment.net for segment in step.segments) == 3 * 8 * 256


EXACT_FROM_4_MIB = "expandable_segments:True,pinned_max_cached_size_mb:4"


@pytest.mark.parametrize(
    ("settings", "tokens", "block"),
    [
        (EXACT_FROM_4_MIB, 640, 2 * 4096 * 640),  # 5 MiB
        (EXACT_FROM_4_MIB, 384, 4 << 20),  # 3 MiB
        ("expandable_segments:True", 640, 8 << 20),
    ],
)
def test_layer_inputs_take_host_memory_as_torch_gives_it_out(two_layers, settings, tokens, block, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", settings)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    step = two_layers.count(tokens, Policy(2, offload=True), True)
    assert step.host_peak() == 2 * block
    # A layer keeps its block for the next micro-batch. Its input, in 16 bits, crosses the link twice.
    assert sum(segment.host_bytes for segment in step.segments) == 2 * block
    assert step.link_bytes() == 2 * 2 * (2 * 4096 * tokens)


def test_shards_take_host_memory_as_torch_gives_it_out(monkeypatch):
    """Of a layer of Llama 3 8B on two cards, rank 16."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", EXACT_FROM_4_MIB)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    forecast = Forecast(recipe_for(LLAMA, layers=2), layout=Layout(2, sharded=True))
    step = forecast.step(256, Policy(2), on_host=1)
    weights = (2 * 4 + 2 * 1 + 3 * 14) << 20  # q and o, k and v, the MLP
    # A: six of 16 x 4096 and one of 16 x 14336. B: q, o and down, k and v, gate and up. Shards in fp32, in KiB.
    exact = 6 * 128 + 448 + 3 * 128 + 2 * 32 + 2 * 448
    rounded = 6 * 128 + 512 + 3 * 128 + 2 * 32 + 2 * 512
    norms = 2 * 4
    # Adapters and gradients are page-locked, the optimizer's two states are not.
    assert step.host_peak() == step.shard_on_host == weights + (2 * rounded + 2 * exact + norms << 10)


def test_gradients_stand_from_the_first_micro_batch_to_the_end_of_the_step(two_layers):
    gradients = 4 * LLAMA_ADAPTER // 32 * 2
    first, later = (two_layers.count(256, Policy(2), accumulates) for accumulates in (False, True))
    assert (first.resident[GRADIENTS], later.resident[GRADIENTS]) == (0, gradients)
    assert max(now[GRADIENTS] for _, now in first.timeline()) == gradients
    after_step = next(reversed([now.copy() for _, now in first.timeline()]))
    assert after_step[GRADIENTS] == 0
    assert {now[GRADIENTS] for _, now in later.timeline()} == {gradients}


def test_every_allocation_is_rounded_up_to_512_bytes(small_llama):
    assert [round_up(size) for size in (1, 512, 513)] == [512, 512, 1024]
    step = Forecast(recipe_for(str(small_llama), lora=LoraSpec(1, 1))).count(64, Policy(2), True)
    # 2 layers * 14 vectors of at most 128 numbers in fp32 take a block each, 3 with AdamW's moments, and one its step;
    # of each layer there are 11 copies in bf16: every B, and the A of q, k and v, of o, of gate and up, and of down
    assert (step.resident[ADAPTERS], step.resident[GRADIENTS]) == ((28 + 22) * 512, 28 * 512)
    assert step.resident[OPTIMIZER] == 28 * 3 * 512


def test_the_bytes_of_llama3_8b_before_a_step():
    base = Forecast(recipe_for(LLAMA)).step(64, Policy(32)).resident
    # 32 layers * (2 * 4096^2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) = 6,979,321,856 weights: half a byte, a byte a block
    # of 64 for its scale, and 4 a block of 256 scales (arXiv:2305.14314 section 3). Beside each of the 224 matrices
    # the 16 and 256 numbers of two code books in fp32, and an offset: 512 + 1024 + 512 bytes.
    assert base[WEIGHTS] == 6_979_321_856 * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 224 * 2048
    # embedding and head, 2 * 128256 * 4096, and 65 norms of 4096, in bf16; RoPE keeps 64 frequencies in fp32 twice
    assert base[EMBEDDINGS] == 2 * (2 * 128256 * 4096 + 65 * 4096) + 2 * 512
    assert base[GRADIENTS] == 4 * LLAMA_ADAPTER
    assert base[ADAPTERS] == (4 + 2) * LLAMA_ADAPTER  # and the copies in bf16 that are held for a step
    # two moments in fp32, and of each of the 448 matrices its step
    assert base[OPTIMIZER] == 8 * LLAMA_ADAPTER + 448 * 512
    assert base[SAVED] == base[WORKING] == 0


def test_the_bytes_of_llama3_8b_in_16_bits():
    assert Forecast(recipe_for(LLAMA, bits=16)).step(64, Policy(32)).resident[WEIGHTS] == 2 * 6_979_321_856


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8_bit_optimizer_keeps_its_moments_in_a_byte_each_and_a_scale_a_block(optimizer):
    base = Forecast(recipe_for(LLAMA, optimizer=optimizer)).step(64, Policy(32)).resident
    # 4 bytes a block of 256 (arXiv:2110.02861 section 2), for the moments of k's and v's B, 64 blocks, rounded up from
    # 256 bytes to 512; and two tables of 256 numbers in fp32 that all of them share
    assert base[OPTIMIZER] == 2 * LLAMA_ADAPTER * (1 + 4 / 256) + 32 * 2 * 2 * 256 + 2 * 1024


def bytes_per_token(forecast: Forecast, policy: Policy, layer: int = 1) -> float:
    """Bytes that an inner layer leaves standing for each token; what it leaves whatever the tokens cancels out."""
    short, long = (forecast.count(tokens, policy, True).segment(f"forward {layer}").net for tokens in (1024, 2048))
    return (long - short) / 1024


# Of a layer: hidden size, that of the MLP, of queries and of keys; heads; whether queries and keys have norms.
H, INTERMEDIATE, Q, K, HEADS, RANK = 4096, 14336, 4096, 1024, 32, 16
SIZES = {
    LLAMA: (H, INTERMEDIATE, Q, K, HEADS, False),
    "mistralai/Mistral-7B-Instruct-v0.3": (H, INTERMEDIATE, Q, K, HEADS, False),
    "Qwen/Qwen2.5-14B-Instruct": (5120, 13824, 5120, 1024, 40, False),
    QWEN3: (5120, 17408, 5120, 1024, 40, True),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_stock_layer_saves_its_norms_in_fp32_and_every_step_of_its_mlp(name):
    h, intermediate, q, k, heads, inner_norms = SIZES[name]
    # The inputs of two norms in fp32, their outputs, and a number: 2 * (4h + 2h + 4). Query, key and value, attention's
    # output and log-sum-exp. gate, its SiLU, up, their product. 7 LoRA bottlenecks.
    saved = 12 * h + 8 + 4 * q + 4 * k + 4 * heads + 8 * intermediate + 14 * RANK
    if inner_norms:  # their inputs in fp32, and a number for each head
        saved += 4 * (q + k) + 4 * (heads + 8)
    expected = {LLAMA: 184_680, QWEN3: 250_440}.get(name, saved)  # 180.35 and 244.57 KiB
    assert bytes_per_token(Forecast(recipe_for(name, layers=3, kernels="stock")), Policy(3, 3)) == saved == expected


@pytest.mark.parametrize("name", SIZES)
def test_a_lean_layer_saves_half_of_that(name):
    h, intermediate, q, k, heads, inner_norms = SIZES[name]
    # The inputs of two norms. Query, key and value, attention's output and log-sum-exp. gate and up.
    saved = 4 * h + 4 * q + 4 * k + 4 * heads + 4 * intermediate
    if inner_norms:  # their inputs
        saved += 2 * (q + k)
    expected = {LLAMA: 94_336, QWEN3: 127_136}.get(name, saved)  # 92.1 and 124.2 KiB
    assert bytes_per_token(Forecast(recipe_for(name, layers=3)), Policy(3, 3)) == saved == expected


@pytest.mark.parametrize(("kernels", "frozen_matmuls"), [("lean", 6), ("stock", 7)])
def test_a_lean_layer_recomputes_6_frozen_matmuls_and_a_stock_one_7(kernels, frozen_matmuls):
    forecast = Forecast(recipe_for(LLAMA, layers=3, kernels=kernels))
    kept, recomputed = (
        forecast.count(2048, policy, True).segment("backward 1").work.flops for policy in (Policy(3, 3), Policy(3))
    )
    down = H * INTERMEDIATE
    frozen = 218_103_808 if frozen_matmuls == 7 else 218_103_808 - down
    # Of the adapters too, what nobody reads is left out: of down_proj's both matmuls, and in a stock layer its B.
    low_rank = RANK * (81_920 - H - (INTERMEDIATE if kernels == "lean" else 0))
    attention = 2048 * Q  # causal: half of the 2 * tokens * q of a token
    assert recomputed - kept == 2 * 2048 * (frozen + low_rank + attention)


def test_lora_dropout_saves_a_mask_and_a_copy_of_every_input():
    forecast = Forecast(recipe_for(LLAMA, layers=3, lora=LoraSpec(16, 16, dropout=0.1)))
    inputs = 5 * H + Q + INTERMEDIATE  # of q, k, v, gate and up; of o; of down
    in_place_of = 2 * (2 * H + INTERMEDIATE)  # two norms' outputs and the product; attention saves its output itself
    saved = bytes_per_token(forecast, Policy(3, 3))
    assert saved - 184_680 == (1 + 2) * inputs - in_place_of == 70 * 1024


def test_a_layer_that_recomputes_saves_its_input_alone():
    forecast = Forecast(recipe_for(LLAMA, layers=4))
    assert bytes_per_token(forecast, Policy(3)) == 2 * H
    # attention's output and log-sum-exp
    assert bytes_per_token(forecast, Policy(3, keep_attention=True)) == 2 * H + 2 * Q + 4 * HEADS
    # The first layer's input stays: it is the output of the embedding.
    assert bytes_per_token(forecast, Policy(4, offload=True), layer=2) == 0


def test_with_offload_every_layer_input_waits_in_host_memory():
    step = Forecast(recipe_for(LLAMA)).step(1024, Policy(32, offload=True))
    assert step.host_peak() == 32 * 1024 * 2 * H
    there_and_back = sum(segment.work.link_bytes for segment in step.segments)
    assert there_and_back == 2 * 32 * 1024 * 2 * H


class GpuDropout(nn.Dropout):
    """Saves a mask of one byte an entry, as on a GPU; on a CPU torch keeps the noise itself, in fp32."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(inputs, self.p, self.training)[0]


def count_bert(layers: int, kept: int) -> Step:
    """BERT-large, its size in `layers`, trained in full with AdamW in fp32 on 64 rows of 512 tokens."""
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=4096,
        attn_implementation="sdpa",
        # With its 0.1 a CPU has no fused attention. On a GPU it costs nothing: backward draws the mask again.
        attention_probs_dropout_prob=0.0,
    )
    mode = FakeTensorMode()
    with mode:
        model = BertModel(config, add_pooling_layer=False).train()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout):
            model.set_submodule(name, GpuDropout(module.p))
    checkpoint_activations(model, Policy(layers, kept))
    with mode:
        ids = torch.zeros((64, 512), dtype=torch.int64)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        return count_step(
            model, lambda: model(input_ids=ids).last_hidden_state.square().mean(), optimizer, accumulates=False
        )


# Parameters of BERT-large's encoder: (30522 + 512 + 2) * 1024 of embeddings and 2 * 1024 of their norm; a layer has
# 4 * 1024^2 + 2 * 1024 * 4096 in matrices, 9 * 1024 + 4096 in biases and norms.
BERT = 31_782_912 + 24 * 12_596_224
# Saved by a layer that keeps its activations, a token, in fp32: query, key, value, attention's output, and of each of
# two norms input and output are 32 H; two masks of dropout 2 H; before and after the GELU 8 I; 16 log-sum-exps, and
# mean and deviation of the norms, 4 numbers.
BERT_SAVED = 34 * 1024 + 8 * 4096 + 4 * (16 + 4)


@pytest.mark.parametrize(("kept", "gib"), [(1, 54.07), (0, 9.44)], ids=["none", "every layer"])
def test_bert_large_without_checkpointing_takes_54_GiB_and_with_it_less_than_a_fifth(kept, gib):
    full = count_bert(24, 24 * kept)
    assert full.resident[ADAPTERS] == pytest.approx(
        4 * BERT, rel=1e-3
    )  # all that is trained; rounded to 512 bytes each
    assert full.peak() / GIB == pytest.approx(gib, rel=0.01)
    saved = full.segment("forward 12").net / (64 * 512)
    assert saved == (BERT_SAVED if kept else 4 * 1024)
    three = count_bert(3, 3 * kept)
    spliced = splice_layers([Part(three, layers_to_copy(24, 3, 1))])
    assert (spliced.peak(), spliced.resident) == (full.peak(), full.resident)
