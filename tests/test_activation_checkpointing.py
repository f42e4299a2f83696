import pytest
import torch
from torch.utils.checkpoint import checkpoint

from common.activation_checkpointing import (
    checkpoint_activations,
    decoder_layers,
    trainer_arguments,
    watch_recompute,
)
from common.adapters import attach_lora
from common.loading import load_4bit
from common.recipe import LoraSpec, ModelSpec
from tests.conftest import ARCHITECTURES, FP32

IDS = torch.arange(10, 74).view(2, 32)


def adapted(folder, policy="every layer", dropout=0.0):
    model = attach_lora(load_4bit(ModelSpec(str(folder)), FP32), LoraSpec(rank=4, alpha=8, dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: without this no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.05)
    checkpoint_activations(model, policy)
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pitfalls_15_and_16_recompute_gives_the_same_gradients_bit_for_bit(small_model, architecture, dropout):
    folder = small_model(architecture)
    torch.manual_seed(1)
    plain = adapted(folder, "none", dropout)
    torch.manual_seed(1)
    recomputed = adapted(folder, "every layer", dropout)
    recomputed.load_state_dict(plain.state_dict(), strict=False)
    expected, got = gradients(plain), gradients(recomputed)
    assert len(got) == 2 * 7 * 2
    assert all(got[name] is not None and got[name].abs().sum() > 0 for name in got)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("policy", "runs"), [("every layer", 2), ("none", 1)])
def test_each_layer_runs_as_often_as_the_policy_says(small_llama, policy, runs):
    model = adapted(small_llama, policy)
    with watch_recompute(model) as watch:
        gradients(model)
    assert dict(watch.runs) == {0: runs, 1: runs}
    assert watch.micro_batches == 1
    watch.verify(policy)


def test_a_layer_that_should_recompute_and_does_not_is_an_error(small_llama):
    model = adapted(small_llama)
    decoder_layers(model)[1].gradient_checkpointing = False
    with watch_recompute(model) as watch:
        gradients(model)
    with pytest.raises(RuntimeError, match="layer 1 ran 1 times in 1 micro-batches, expected 2"):
        watch.verify("every layer")


def test_pitfall_14_reentrant_recompute_is_an_error(small_llama):
    model = adapted(small_llama)
    for layer in decoder_layers(model):
        layer._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=True)
    with watch_recompute(model) as watch:
        gradients(model)
    with pytest.raises(RuntimeError, match="layer 0 ran without gradients: activation checkpointing is reentrant"):
        watch.verify("every layer")


def test_pitfall_14_the_trainer_gets_the_same_definition():
    assert list(trainer_arguments("every layer").values()) == [True, {"use_reentrant": False}]
    assert list(trainer_arguments("none").values())[0] is False


def test_pitfall_17_no_cache_is_kept(small_llama):
    model = adapted(small_llama)
    assert model(input_ids=IDS).past_key_values is None


def test_a_model_without_such_layers_is_an_error():
    with pytest.raises(ValueError, match="Linear has no layer that supports activation checkpointing"):
        decoder_layers(torch.nn.Linear(2, 2))
