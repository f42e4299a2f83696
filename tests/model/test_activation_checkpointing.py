import pytest
import torch
from torch.utils.checkpoint import checkpoint

from common.model.activation_checkpointing import (
    Policy,
    checkpoint_activations,
    decoder_layers,
    watch_recompute,
)
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.recipe import LoraSpec, ModelSpec
from tests.conftest import ARCHITECTURES, FP32

IDS = torch.arange(10, 74).view(2, 32)
NONE, EVERY = Policy(3, 3), Policy(3)
RECOMPUTING = {
    "every layer": EVERY,
    "some layers": Policy(3, 1),
    "keep attention": Policy(3, keep_attention=True),
    "offload": Policy(3, offload=True),
    "all at once": Policy(3, 1, keep_attention=True, offload=True),
}


@pytest.fixture(scope="module")
def folders(small_model):
    return {name: small_model(name, num_hidden_layers=3) for name in ARCHITECTURES}


def adapted(folder, policy=EVERY, dropout=0.0, kernels="lean"):
    model = attach_lora(load_4bit(ModelSpec(str(folder)), FP32), LoraSpec(rank=4, alpha=8, dropout=dropout))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: without this no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.05)
    use_lean_layers(model, kernels)
    checkpoint_activations(model, policy)
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kernels", "dropout"), [("lean", 0.0), ("stock", 0.0), ("stock", 0.2)])
@pytest.mark.parametrize("policy", RECOMPUTING)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pitfalls_15_and_16_every_policy_gives_the_same_gradients_bit_for_bit(
    folders, architecture, policy, kernels, dropout
):
    expected = gradients(adapted(folders[architecture], NONE, dropout, kernels))
    got = gradients(adapted(folders[architecture], RECOMPUTING[policy], dropout, kernels))
    assert len(got) == 3 * 7 * 2
    assert all(got[name] is not None and got[name].abs().sum() > 0 for name in got)
    # A recompute does the same sums in the same order, and what is kept or copied is what was computed.
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kernels", ["lean", "stock"])
@pytest.mark.parametrize(
    ("policy", "runs", "attentions"),
    [
        (NONE, [1, 1, 1], 3),
        (EVERY, [2, 2, 2], 6),
        (Policy(3, 1), [2, 2, 1], 5),
        (Policy(3, keep_attention=True), [2, 2, 2], 3),
        (Policy(3, 2, keep_attention=True), [2, 1, 1], 3),
        (Policy(3, offload=True), [2, 2, 2], 6),
    ],
    ids=str,
)
def test_each_layer_and_attention_run_as_often_as_the_policy_says(folders, policy, runs, attentions, kernels):
    model = adapted(folders["llama"], policy, kernels=kernels)
    with watch_recompute(model) as watch:
        gradients(model)
    assert [watch.runs[index] for index in range(3)] == runs
    assert (watch.micro_batches, watch.attentions) == (1, attentions)
    watch.verify(policy)


def test_pitfall_16_dropout_that_only_the_config_names_is_drawn_alike_too(small_model, folders):
    folder = small_model("llama", num_hidden_layers=3, attention_dropout=0.2)
    expected = gradients(adapted(folder, NONE))
    got = gradients(adapted(folder))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    undropped = gradients(adapted(folders["llama"]))
    assert not any(torch.equal(got[name], undropped[name]) for name in got)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_state_of_random_numbers_is_saved_where_something_is_random(folders, dropout, monkeypatch):
    saved, stock = [], torch.get_rng_state
    model = adapted(folders["llama"], dropout=dropout)
    monkeypatch.setattr(torch, "get_rng_state", lambda: saved.append(1) or stock())
    gradients(model)
    assert len(saved) == (2 * 3 if dropout else 0)  # of each layer, in forward and beside its recompute


def saved_bytes(policy, folder) -> int:
    """Bytes that the forward pass keeps for backward, of storages that are not the model's."""
    model = adapted(folder, policy)
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=IDS, labels=IDS)
    return sum(seen.values())


def test_with_offload_no_layer_input_stays_on_the_device(folders):
    boundaries = 3 * 2 * 32 * 64 * 4  # layers * rows * tokens * hidden * fp32
    stays, leaves = (saved_bytes(policy, folders["llama"]) for policy in (EVERY, Policy(3, offload=True)))
    assert stays - leaves == boundaries


def test_the_policy_can_change_between_steps(folders):
    model = adapted(folders["llama"], NONE)
    expected = gradients(model)
    for policy in (Policy(3, 1, offload=True), Policy(3, keep_attention=True), NONE):
        model.zero_grad()
        checkpoint_activations(model, policy)
        with watch_recompute(model) as watch:
            got = gradients(model)
        watch.verify(policy)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_forward_pass_without_backward_leaves_nothing_behind_for_the_next(folders):
    model = adapted(folders["llama"], Policy(3, offload=True))
    expected = gradients(model)
    model.zero_grad()
    model(input_ids=IDS.flip(0), labels=IDS)
    got = gradients(model)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_layer_that_should_recompute_and_does_not_is_an_error(folders):
    model = adapted(folders["llama"])
    decoder_layers(model)[1].gradient_checkpointing = False
    with watch_recompute(model) as watch:
        gradients(model)
    with pytest.raises(RuntimeError, match="layer 1 ran 1 times in 1 micro-batches, expected 2: every layer"):
        watch.verify(EVERY)


def test_attention_that_should_be_kept_and_is_not_is_an_error(folders):
    model = adapted(folders["llama"])
    with watch_recompute(model) as watch:
        gradients(model)
    with pytest.raises(RuntimeError, match="attention ran 6 times in 1 micro-batches, expected 3"):
        watch.verify(Policy(3, keep_attention=True))


def test_pitfall_14_reentrant_recompute_is_an_error(folders):
    model = adapted(folders["llama"])
    for layer in decoder_layers(model):
        layer._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=True)
    with watch_recompute(model) as watch:
        gradients(model)
    with pytest.raises(RuntimeError, match="layer 0 ran without gradients: activation checkpointing is reentrant"):
        watch.verify(EVERY)


def test_pitfall_17_no_cache_is_kept(folders):
    model = adapted(folders["llama"])
    assert model(input_ids=IDS).past_key_values is None


def test_a_model_without_such_layers_is_an_error():
    with pytest.raises(ValueError, match="Linear has no layer that supports activation checkpointing"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_a_policy_for_another_model_is_an_error(folders):
    with pytest.raises(ValueError, match="the policy is for 4 layers, the model has 3"):
        adapted(folders["llama"], Policy(4))
    with pytest.raises(ValueError, match="4 of 3 layers cannot keep"):
        Policy(3, 4)


def test_policies_by_name_and_in_words():
    assert Policy.named("none", 32) == Policy(32, 32)
    assert str(Policy.named("none", 32)) == "no layer recomputes"
    assert str(Policy.named("every layer", 32)) == "every layer recomputes"
    assert str(Policy.named("keep attention", 32)) == "every layer recomputes, but attention"
    assert str(Policy(32, 12, offload=True)) == "the first 20 of 32 layers recompute, layer inputs in host memory"
    with pytest.raises(ValueError, match="the plan decides"):
        Policy.named("auto", 32)
