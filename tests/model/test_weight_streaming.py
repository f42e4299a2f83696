"""Weights that stream from host memory, on the poisoned clock: with all waits in place nothing changes by a bit."""

import pytest
import torch
from torch import Tensor, nn

from common.data.batches import collate
from common.machine import shared_memory
from common.machine.copy_stream import CopyStream
from common.machine.layout import Layout, spread_layers
from common.model import loading
from common.model.activation_checkpointing import Policy, checkpoint_activations, decoder_layers, finish_copies
from common.model.attention import PACKED_ATTENTION
from common.model.lean_layers import is_lean, use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.model.weight_streaming import (
    RING_SLOTS,
    WeightRing,
    leave_ring_to_processes,
    stream_weights,
    streamed_tensors,
    weight_ring,
)
from common.recipe import LoraSpec, ModelSpec, UserError
from tests import flash_on_cpu  # noqa: F401 - gives torch the operators of packed attention
from tests.conftest import ARCHITECTURES, FP32, MIXED, TINY
from tests.poisoned_clock import PoisonedClock

LAYERS = 5
POLICIES = {
    "none": Policy(LAYERS, LAYERS),
    "every layer": Policy(LAYERS),
    "some layers": Policy(LAYERS, 2),
    "keep attention": Policy(LAYERS, keep_attention=True),
    "offload": Policy(LAYERS, offload=True),
    "all at once": Policy(LAYERS, 2, keep_attention=True, offload=True),
}
SIZES = [(2, 24), (1, 32), (2, 16)]  # rows and tokens a row of the micro-batches of an optimizer step
LORA = LoraSpec(rank=4, alpha=8)


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.arange(10, 10 + rows * tokens).view(rows, tokens)


@pytest.fixture(scope="module")
def folders(small_model):
    return {name: small_model(name, num_hidden_layers=LAYERS) for name in ARCHITECTURES}


def adapted(folder, kernels: str = "lean", lora: LoraSpec = LORA, bits: int = 4):
    model = attach_lora(load_4bit(ModelSpec(str(folder), bits=bits), FP32), lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    use_lean_layers(model, kernels)
    return model.train()


def rectangles() -> list[dict]:
    """The micro-batches of an optimizer step, and last a held-out one."""
    return [{"input_ids": ids, "labels": ids} for ids in (*(ids_of(*size) for size in SIZES), ids_of(2, 20))]


def train_step(model, policy: Policy, batches: list[dict] | None = None) -> dict[str, Tensor]:
    """Losses and gradients of an optimizer step with an evaluation in its middle. batches: as rectangles."""
    checkpoint_activations(model, policy)
    model.zero_grad()
    torch.manual_seed(2)  # of dropout
    found = {}
    *batches, held_out = batches or rectangles()
    for number, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        found[f"loss {number}"] = loss.detach().clone()
        if number == 0:
            found["held out"] = held_out_loss(model, held_out)
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def held_out_loss(model, batch: dict) -> Tensor:
    model.eval()
    loss: Tensor = model(**batch).loss.clone()
    model.train()
    return loss


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all()
        assert torch.equal(found[name], value), name


def streamed_on_clock(model, on_host: int, policy: Policy) -> tuple[dict[str, Tensor], int]:
    """What train_step finds, and how many copies were begun."""
    with PoisonedClock() as clock:
        stream_weights(model, on_host)
        found = train_step(model, policy)
        weight_ring(model).finish()
        finish_copies(model)
    return found, clock.copies


@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [
        *((name, "lean") for name in ARCHITECTURES),
        ("llama", "stock"),
        # the same code with other architectures, 4 s each
        *(pytest.param(name, "stock", marks=pytest.mark.slow) for name in ARCHITECTURES if name != "llama"),
    ],
)
def test_losses_and_gradients_are_the_same_bits_whenever_the_copies_happen(folders, architecture, kernels):
    model = adapted(folders[architecture], kernels)
    expected = {name: train_step(model, policy) for name, policy in POLICIES.items()}
    with PoisonedClock():
        stream_weights(model, LAYERS)
        for name, policy in POLICIES.items():
            assert_same_bits(train_step(model, policy), expected[name])
        weight_ring(model).finish()
        finish_copies(model)


@pytest.mark.parametrize(
    ("lora", "bits"),
    [
        (LoraSpec(rank=4, alpha=8, dropout=0.2), 4),
        (LoraSpec(rank=4, alpha=8, dora=True), 4),
        (LoraSpec(rank=4, alpha=8, dora=True, dropout=0.1), 16),
        (LoraSpec(rank=4, alpha=8, rslora=True), 4),
        (LoraSpec(rank=4, alpha=8, target_modules=("q_proj", "down_proj")), 4),
        (LORA, 16),
    ],
    ids=["dropout", "dora", "dora, dropout, 16 bits", "rslora", "q and down", "16 bits"],
)
@pytest.mark.parametrize("policy", ["none", "every layer", "all at once"])
def test_other_adapters_and_16_bits_give_the_same_bits_too(folders, lora, bits, policy):
    model = adapted(folders["qwen2"], "lean", lora, bits)
    expected = train_step(model, POLICIES[policy])
    found, copies = streamed_on_clock(model, 4, POLICIES[policy])
    assert_same_bits(found, expected)
    assert copies


FAULTS = {
    "the computation does not wait": ("wait", lambda _: None),
    "the copy does not wait": ("copy", lambda copies, target, source: copy_without_waiting(copies, target, source)),
}


def copy_without_waiting(copies: CopyStream, target: Tensor, source: Tensor) -> None:
    with torch.cuda.stream(copies.stream):
        target.copy_(source, non_blocking=True)


IN_TILES = {
    "tiles, offload": Policy(LAYERS, tile=16, offload=True),
    "by head": Policy(LAYERS, tile=16, by_head=True),
    "by head, keep attention": Policy(LAYERS, tile=16, by_head=True, keep_attention=True),
    "by head, offload": Policy(LAYERS, tile=16, by_head=True, offload=True),
}


def packed_rows() -> list[dict]:
    """As rectangles, in packed rows whose examples end inside of tiles."""
    rows = []
    for lengths in ((30, 17, 9), (40,), (5, 21), (20, 13)):
        ids = ids_of(1, sum(lengths))[0].tolist()
        rows.append(collate([{"input_ids": ids, "labels": ids, "seq_lengths": list(lengths)}], 0, padding_free=True))
    return rows


@pytest.mark.parametrize("architecture", ["mistral", "qwen3"])
def test_in_tiles_and_by_head_with_layer_inputs_on_the_host_too(folders, architecture):
    """Tiles write gradients over what they replace, while weights and layer inputs come and go."""
    model = adapted(folders[architecture])
    model.set_attn_implementation(PACKED_ATTENTION)
    expected = {name: train_step(model, policy, packed_rows()) for name, policy in IN_TILES.items()}
    with PoisonedClock() as clock:
        stream_weights(model, LAYERS)
        for name, policy in IN_TILES.items():
            before = clock.copies
            assert_same_bits(train_step(model, policy, packed_rows()), expected[name])
            assert clock.copies > before
        weight_ring(model).finish()
        finish_copies(model)


@pytest.mark.parametrize(("name", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_wait_that_is_missing_is_noticed_in_tiles_too(folders, monkeypatch, name, fault):
    model = adapted(folders["llama"])
    model.set_attn_implementation(PACKED_ATTENTION)
    monkeypatch.setattr(CopyStream, name, fault)
    with PoisonedClock():
        stream_weights(model, LAYERS)
        found = train_step(model, IN_TILES["by head"], packed_rows())
        weight_ring(model).finish()
    assert any(not value.isfinite().all() for value in found.values())


def test_stock_layers_in_16_bits_that_keep_their_activations_keep_no_weights(folders):
    """torch saves a frozen weight for the gradient of its layer's input. By then another layer was in its slot."""
    model = adapted(folders["llama"], "stock", LORA, 16)
    expected = train_step(model, POLICIES["none"])
    found, _ = streamed_on_clock(model, LAYERS, POLICIES["none"])
    assert_same_bits(found, expected)


def test_a_checkpoint_with_layers_of_several_sizes_streams(four_bit):
    model = adapted(four_bit(**MIXED))
    layers = len(decoder_layers(model))
    policy = Policy(layers, 1)
    expected = train_step(model, policy)
    found, _ = streamed_on_clock(model, layers, policy)
    assert_same_bits(found, expected)
    assert len({block.nbytes for block in weight_ring(model).blocks}) > 1


@pytest.mark.parametrize("on_host", [1, 2, 3, 4])
def test_only_the_layers_that_were_chosen_stream_and_others_stay(folders, on_host):
    model = adapted(folders["qwen3"])
    expected = train_step(model, POLICIES["some layers"])
    found, _ = streamed_on_clock(model, on_host, POLICIES["some layers"])
    assert_same_bits(found, expected)
    ring = weight_ring(model)
    slots = {slot.untyped_storage()._cdata for slot in ring.slots}
    streaming = [
        index
        for index, layer in enumerate(decoder_layers(model))
        if {t.owner.data.untyped_storage()._cdata for t in streamed_tensors(layer)[0] if t.name == "data"} <= slots
    ]
    assert streaming == spread_layers(on_host, LAYERS)


def test_a_layer_is_copied_once_in_each_direction_and_the_two_at_each_turn_not_at_all(folders):
    model = adapted(folders["llama"])
    checkpoint_activations(model, POLICIES["some layers"])
    with PoisonedClock() as clock:
        stream_weights(model, LAYERS)
        begun = []
        for _ in range(3):
            ids = ids_of(1, 16)
            before = clock.copies
            model(input_ids=ids, labels=ids).loss.backward()
            begun.append(clock.copies - before)
        weight_ring(model).finish()
    each_way = LAYERS - RING_SLOTS
    assert begun == [RING_SLOTS + 2 * each_way, 2 * each_way, 2 * each_way]


def gradients_of_two_passes(model, policy: Policy) -> dict[str, Tensor]:
    """Two forward passes, and one backward pass through both."""
    checkpoint_activations(model, policy)
    model.zero_grad()
    first, second = (model(input_ids=ids, labels=ids).loss for ids in (ids_of(1, 16), ids_of(2, 12)))
    (first - 0.5 * second).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_two_forward_passes_before_their_backward_passes_are_right_too(folders):
    """As with a chosen and a rejected answer."""
    model = adapted(folders["llama"])
    expected = gradients_of_two_passes(model, POLICIES["some layers"])
    with PoisonedClock():
        stream_weights(model, LAYERS)
        assert_same_bits(gradients_of_two_passes(model, POLICIES["some layers"]), expected)
        weight_ring(model).finish()


@pytest.mark.parametrize("on_host", [4, 5])
def test_answers_are_the_same(folders, on_host):
    model = adapted(folders["mistral"]).eval()
    prompt = {"input_ids": ids_of(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    expected = model.generate(**prompt, **options)
    with PoisonedClock() as clock:
        stream_weights(model, on_host)
        assert torch.equal(model.generate(**prompt, **options), expected)
        weight_ring(model).finish()
    # Of an odd number the first layer shares its slot with the last one, and comes when that is done.
    assert clock.copies <= (1 + 6) * on_host


def test_a_micro_batch_that_is_left_in_its_middle_does_no_harm(folders):
    model = adapted(folders["llama"])
    policy = POLICIES["some layers"]
    expected = train_step(model, policy)

    def fail(_: Tensor) -> None:
        raise torch.OutOfMemoryError("injected")

    with PoisonedClock():
        stream_weights(model, LAYERS)
        for layer in range(LAYERS):
            parameter = next(p for n, p in model.named_parameters() if f"layers.{layer}.self_attn.q_proj.lora_A" in n)
            hook, ids = parameter.register_hook(fail), ids_of(*SIZES[0])
            with pytest.raises(torch.OutOfMemoryError):
                model(input_ids=ids, labels=ids).loss.backward()
            hook.remove()
            assert_same_bits(train_step(model, policy), expected)
        weight_ring(model).finish()


@pytest.mark.parametrize(("name", "fault"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("policy", ["none", "every layer"])
def test_a_wait_that_is_missing_is_noticed(folders, monkeypatch, name, fault, policy):
    model = adapted(folders["llama"])
    monkeypatch.setattr(CopyStream, name, fault)
    found, _ = streamed_on_clock(model, LAYERS, POLICIES[policy])
    assert any(not value.isfinite().all() for value in found.values())


def test_a_layer_too_early_in_the_ring_is_noticed(folders, monkeypatch):
    """The layer two further on has the slot of the one that is about to compute."""
    model = adapted(folders["llama"])
    expected = train_step(model, POLICIES["every layer"])

    def enter(ring: WeightRing, number: int, following: int) -> None:
        ring._load(number)
        ring.copies.wait()
        ring._load(max(0, min(2 * following - number, LAYERS - 1)))

    monkeypatch.setattr(WeightRing, "enter", enter)
    found, _ = streamed_on_clock(model, LAYERS, POLICIES["every layer"])
    assert not all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_device_holds_the_ring_and_the_host_every_layer_that_streams(folders):
    model = adapted(folders["llama"])
    layer = decoder_layers(model)[0]
    tensors, size = streamed_tensors(layer)
    assert len(tensors) == 7 * 3  # linear modules; packed values, scales, and scales of scales
    assert size == sum(-(-t.shape.numel() * t.dtype.itemsize // 512) * 512 for t in tensors)
    before = {name: value.shape for name, value in model.named_parameters()}
    stream_weights(model, 3)
    ring = weight_ring(model)
    assert [slot.nbytes for slot in ring.slots] == [size] * RING_SLOTS
    assert [block.nbytes for block in ring.blocks] == [size] * 3
    assert {name: value.shape for name, value in model.named_parameters()} == before
    assert is_lean(model)


def test_streaming_twice_is_once_and_another_number_is_refused(folders):
    model = adapted(folders["llama"])
    stream_weights(model, 0)
    assert weight_ring(model) is None
    stream_weights(model, 3)
    ring = weight_ring(model)
    stream_weights(model, 3)
    assert weight_ring(model) is ring
    with pytest.raises(UserError, match="the weights of 4 layers wait in host memory, and those of 3 do"):
        stream_weights(model, 4)


LAYOUT = Layout(on_host=LAYERS)


@pytest.fixture(params=["4 bit", "16 bit", "stored in 4 bit", "mixed", "random", "tied", "single quantization"])
def spec(request, folders, small_model, four_bit, tmp_path) -> ModelSpec:
    """A model of each kind that can be loaded."""
    match request.param:
        case "16 bit":
            return ModelSpec(str(folders["qwen2"]), bits=16)
        case "stored in 4 bit":
            load_4bit(ModelSpec(str(folders["llama"]))).save_pretrained(tmp_path)
            return ModelSpec(str(tmp_path))
        case "mixed":
            return ModelSpec(str(four_bit(**MIXED)))
        case "single quantization":
            return ModelSpec(str(four_bit(bnb_4bit_quant_type="nf4")))
        case "random":
            return ModelSpec(str(TINY), weights="random", layers=3)
        case "tied":
            return ModelSpec(str(small_model("qwen3", tie_word_embeddings=True, num_hidden_layers=3)))
    return ModelSpec(str(folders["qwen2"]))


@pytest.mark.parametrize("lora", [LORA, LoraSpec(rank=4, alpha=8, dora=True)], ids=["lora", "dora"])
def test_a_model_that_is_loaded_to_its_place_is_the_same(spec, lora):
    whole = attach_lora(load_4bit(spec, FP32), lora, seed=3)
    layers = len(decoder_layers(whole))
    streaming = attach_lora(load_4bit(spec, FP32, layout=Layout(on_host=layers)), lora, seed=3)
    found = []
    for model in (whole, streaming):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.full_like(parameter, 0.01)
        use_lean_layers(model, "lean")
        found.append(train_step(model, Policy(layers, 1)))
    assert_same_bits(found[1], found[0])
    trained = [{name: p for name, p in model.named_parameters() if p.requires_grad} for model in (whole, streaming)]
    assert_same_bits(trained[1], trained[0])
    assert streaming.generation_config.eos_token_id == whole.generation_config.eos_token_id
    assert [p.dtype for p in streaming.parameters()] == [p.dtype for p in whole.parameters()]


def test_while_it_loads_at_most_a_layer_lies_where_it_does_not_stay(folders, monkeypatch):
    """On a card: what stays there and one layer. A block of host memory is taken when its layer was read."""
    held: list[int] = []
    fill = loading.fill_layer

    def watched(layer, *arguments, **named):
        fill(layer, *arguments, **named)
        storages = {
            tensor.untyped_storage()._cdata
            for other in layers_of[0]
            for streamed in streamed_tensors(other)[0]
            if (tensor := getattr(streamed.owner, streamed.name)).numel() and tensor.stride() != (0, 0)
        }
        held.append(len(storages))

    layers_of: list[list[nn.Module]] = []
    take = loading.take_layer_weights

    def remember(model):
        layers_of.append(decoder_layers(model))
        return take(model)

    monkeypatch.setattr(loading, "take_layer_weights", remember)
    monkeypatch.setattr(loading, "fill_layer", watched)
    load_4bit(ModelSpec(str(folders["llama"])), FP32, layout=LAYOUT)
    # Those of the layer that was read just now, 3 for each of 7 weights, and a block of each layer before it.
    assert held == [21 + before for before in range(LAYERS)]


def test_host_memory_that_does_not_suffice_is_a_line(folders, monkeypatch):
    def no_memory(*_):
        raise MemoryError("pinned host memory")

    monkeypatch.setattr(shared_memory, "empty_on_host", no_memory)
    with pytest.raises(UserError, match="does not fit the memory that is free on the host"):
        load_4bit(ModelSpec(str(folders["llama"])), FP32, layout=LAYOUT)


def test_processes_do_not_send_what_lies_in_the_ring(folders):
    model = attach_lora(load_4bit(ModelSpec(str(folders["qwen2"])), FP32, layout=Layout(on_host=3)), LORA)
    leave_ring_to_processes(model)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert len(ignored) == 3 * 7
    assert ignored < {name for name, _ in model.named_parameters()}
    assert not any("lora_" in name or "norm" in name or "bias" in name for name in ignored)


def test_a_model_that_is_moved_to_its_own_device_streams_on(folders):
    """As accelerate does before it wraps a model for several processes: cpu:0 is another device than cpu, a copy."""
    model = adapted(folders["llama"])
    expected = train_step(model, POLICIES["some layers"])
    with PoisonedClock():
        stream_weights(model, 4)
        train_step(model, POLICIES["some layers"])
        model.to("cpu:0")
        assert_same_bits(train_step(model, POLICIES["some layers"]), expected)
        weight_ring(model).finish()
