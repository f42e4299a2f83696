"""Layer inputs in host memory, on the poisoned clock: with every wait in its place nothing changes by a bit."""

import pytest
import torch
from torch import Tensor

from common.machine.copy_stream import CopyStream
from common.model.activation_checkpointing import Policy, checkpoint_activations, decoder_layers, finish_copies
from common.model.activation_offload import OffloadedInputs
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.recipe import LoraSpec, ModelSpec
from common.run.step_down import StepDown
from tests.conftest import FP32
from tests.poisoned_clock import PoisonedClock

LAYERS = 4
ALL_KEPT = Policy(LAYERS, LAYERS)
POLICIES = {
    "recompute": Policy(LAYERS),
    "offload": Policy(LAYERS, offload=True),
    "some kept": Policy(LAYERS, 1, offload=True),
    "all kept": Policy(LAYERS, LAYERS, offload=True),
    "keep attention": Policy(LAYERS, keep_attention=True, offload=True),
    "all at once": Policy(LAYERS, 2, keep_attention=True, offload=True),
}
# Rows and tokens a row of the micro-batches of an optimizer step: they grow and shrink.
SIZES = [(2, 24), (2, 32), (1, 24), (2, 32)]


def batch_of(rows: int, tokens: int) -> Tensor:
    return torch.arange(10, 10 + rows * tokens).view(rows, tokens)


@pytest.fixture(scope="module")
def model(small_model):
    model = attach_lora(
        load_4bit(ModelSpec(str(small_model(num_hidden_layers=LAYERS))), FP32), LoraSpec(rank=4, alpha=8)
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def train_step(model, policy: Policy) -> dict[str, Tensor]:
    """The gradients of an optimizer step, and the losses in it: an evaluation is in its middle, and a new policy."""
    checkpoint_activations(model, policy)
    model.zero_grad()
    found = {}
    for number, size in enumerate(SIZES):
        ids = batch_of(*size)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found[f"loss {number}"] = loss.detach().clone()
        if number == 1:
            model.eval()
            with torch.no_grad():
                found["held out"] = model(input_ids=ids, labels=ids).loss
            model.train()
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def expected(model) -> dict[str, Tensor]:
    return train_step(model, ALL_KEPT)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_policy_gives_the_same_bits_whenever_its_copies_happen(model, expected, policy):
    with PoisonedClock() as clock:
        found = train_step(model, policy)
        finish_copies(model)
    assert clock.copies == 2 * len(SIZES) * policy.offload * policy.recomputed
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_inputs_of_other_strides_are_offloaded_too(model, expected):
    """Within the rounding of a matmul, which adds up in another order for other strides."""
    hooks = [
        layer.register_forward_hook(lambda _, __, output: output.transpose(1, 2).contiguous().transpose(1, 2))
        for layer in decoder_layers(model)
    ]
    with PoisonedClock():
        found = train_step(model, POLICIES["some kept"])
        finish_copies(model)
    for hook in hooks:
        hook.remove()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("policy", [Policy(LAYERS, offload=True), Policy(LAYERS, 1, offload=True)], ids=str)
def test_a_micro_batch_that_is_left_in_its_middle_leaves_no_copy_behind(model, expected, policy):
    """As at a step down: backward fails at each layer in turn, and the step begins again with another policy."""
    for layer in range(policy.recomputed):
        parameter = next(p for name, p in model.named_parameters() if f"layers.{layer}.self_attn.q_proj.lora_A" in name)

        def fail(_: Tensor) -> None:
            raise torch.OutOfMemoryError("injected")

        with PoisonedClock():
            checkpoint_activations(model, policy)
            model.zero_grad()
            hook, ids = parameter.register_hook(fail), batch_of(*SIZES[0])
            with pytest.raises(torch.OutOfMemoryError):
                model(input_ids=ids, labels=ids).loss.backward()
            hook.remove()
            if layer % 2:  # goes on with the same policy
                model(input_ids=ids, labels=ids).loss.backward()
            found = train_step(model, Policy(LAYERS, offload=True))
            finish_copies(model)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_a_step_down_in_mid_step_begins_the_step_again_with_the_same_bits(model):
    """Memory runs out in the backward pass of the second of two micro-batches, while an input is on its way back."""
    batches = [
        {"input_ids": ids, "labels": ids, "position_ids": torch.arange(ids.shape[1]).repeat(len(ids), 1)}
        for ids in (batch_of(2, 24), batch_of(2, 32))
    ]

    def compute(batch: dict[str, Tensor]) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    def step(step_down: StepDown) -> list[Tensor]:
        checkpoint_activations(model, step_down.policy)
        model.zero_grad()
        losses = [step_down.compute(compute, batches[: last + 1], 1, backward=True) for last in range(2)]
        return losses + [p.grad.clone() for p in model.parameters() if p.requires_grad]

    calls: list[int] = []

    def fail(_: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")

    expected = step(StepDown(model, ALL_KEPT))
    parameter = next(p for name, p in model.named_parameters() if "layers.1.self_attn.q_proj.lora_A" in name)
    hook = parameter.register_hook(fail)
    with PoisonedClock():
        step_down = StepDown(model, Policy(LAYERS, 2, offload=True))
        found = step(step_down)
        finish_copies(model)
    hook.remove()
    assert step_down.taken == ["step 1: the first 3 of 4 layers recompute, layer inputs in host memory"]
    assert all(torch.equal(value, other) for value, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("wait", ["wait", "synchronize"])
def test_without_the_waits_it_is_noticed(model, expected, monkeypatch, wait):
    """The clock sees what this code does: a wait that does nothing is a NaN, or memory that is freed too early."""
    monkeypatch.setattr(CopyStream, wait, lambda _: None)
    noticed = False
    try:
        with PoisonedClock():
            checkpoint_activations(model, Policy(LAYERS, offload=True))
            offloaded = decoder_layers(model)[0].offloaded_inputs
            loss = model(input_ids=batch_of(2, 24), labels=batch_of(2, 24)).loss
            if wait == "synchronize":  # left in its middle
                offloaded.start_return(2)
                offloaded.finish()
            else:
                loss.backward()
                grads = [p.grad for p in model.parameters() if p.requires_grad]
                noticed = any(grad.isnan().any() for grad in grads)
    except AssertionError as error:
        noticed = "freed while a copy" in str(error)
    assert noticed


def test_host_memory_is_taken_once_for_the_largest_micro_batch(model):
    checkpoint_activations(model, Policy(LAYERS, offload=True))
    offloaded, taken = decoder_layers(model)[0].offloaded_inputs, []
    for rows in (1, 3, 2, 3, 1):
        ids = batch_of(rows, 16)
        model(input_ids=ids, labels=ids).loss.backward()
        taken.append({layer: (block.nbytes, block.data_ptr()) for layer, block in offloaded.blocks.items()})
    size = 16 * model.config.hidden_size * 4  # fp32, of one row
    assert [{nbytes for nbytes, _ in blocks.values()} for blocks in taken] == [{size}, *[{3 * size}] * 4]
    assert taken[1] == taken[2] == taken[3] == taken[4]
    assert not offloaded.hosts and not offloaded.returning
    finish_copies(model)
    assert not offloaded.blocks


def test_a_second_backward_pass_is_refused_instead_of_wrong():
    """The block of a layer holds one input: that of the last forward pass."""
    offloaded, first, second = OffloadedInputs(), torch.ones(2, 3), torch.zeros(2, 3)
    packed, later = offloaded.pack(0, first), offloaded.pack(0, second)
    with pytest.raises(RuntimeError, match="the input of layer 0 is not in host memory any more"):
        offloaded.unpack(packed)
    assert torch.equal(offloaded.unpack(later), second)
    with pytest.raises(RuntimeError, match="one backward pass a forward"):
        offloaded.unpack(later)
