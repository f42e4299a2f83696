"""Which layers recompute changes memory and time, and no gradient."""

import pytest
import torch

from common.model.activation_checkpointing import Policy, checkpoint_activations, watch_recompute
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.recipe import LoraSpec, ModelSpec
from tests.conftest import FP32

LAYERS = 30
RECOMPUTING = [
    Policy(LAYERS),
    Policy(LAYERS, 11),
    Policy(LAYERS, keep_attention=True),
    Policy(LAYERS, offload=True),
    Policy(LAYERS, 11, keep_attention=True, offload=True),
]


@pytest.mark.slow  # six times forward and backward through 30 layers
@pytest.mark.parametrize("bits", [4, 16])
def test_every_policy_gives_the_same_gradients_bit_for_bit(real_model, bits):
    spec = ModelSpec(str(real_model), bits=bits)
    model = attach_lora(load_4bit(spec, FP32), LoraSpec(rank=4, alpha=8)).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: without this no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.02)
    use_lean_layers(model, "lean")
    ids = load_tokenizer(spec)("The capital of France is Paris, and that of Italy is Rome.", return_tensors="pt")

    def gradients(policy: Policy) -> dict[str, torch.Tensor]:
        checkpoint_activations(model, policy)
        model.zero_grad()
        with watch_recompute(model) as watch:
            model(input_ids=ids["input_ids"], labels=ids["input_ids"]).loss.backward()
        watch.verify(policy)
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(Policy(LAYERS, LAYERS))
    assert len(expected) == LAYERS * 7 * 2
    assert all(gradient.isfinite().all() and gradient.any() for gradient in expected.values())
    for policy in RECOMPUTING:
        got = gradients(policy)
        assert all(torch.equal(got[name], expected[name]) for name in expected), policy
