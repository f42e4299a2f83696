"""Which layers recompute changes memory and time, and no gradient."""

import pytest
import torch

from common.data.batches import collate
from common.model.activation_checkpointing import Policy, checkpoint_activations, watch_recompute
from common.model.attention import PACKED_ATTENTION
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.recipe import LoraSpec, ModelSpec
from common.tokens.labels import IGNORED
from tests import flash_on_cpu  # noqa: F401  layers in tiles go with packed attention alone
from tests.conftest import FP32
from tests.real_model.test_training import ADDITIONS, U

LAYERS = 30
RECOMPUTING = [
    Policy(LAYERS),
    Policy(LAYERS, 11),
    Policy(LAYERS, keep_attention=True),
    Policy(LAYERS, offload=True),
    Policy(LAYERS, 11, keep_attention=True, offload=True),
]
IN_TILES = [
    Policy(LAYERS, tile=16),
    Policy(LAYERS, tile=16, by_head=True),
    Policy(LAYERS, tile=16, by_head=True, offload=True),
]
TEXT = "The capital of France is Paris, and that of Italy is Rome."


@pytest.mark.slow  # ten times forward and backward through 30 layers
@pytest.mark.parametrize("bits", [4, 16])
def test_every_policy_gives_the_same_gradients(real_model, bits):
    """Bit for bit. Layers in tiles add up in another order: they do as far as fp32 goes (tests/real_model/test_training
    has the derivation)."""
    spec = ModelSpec(str(real_model), bits=bits)
    model = attach_lora(load_4bit(spec, FP32), LoraSpec(rank=4, alpha=8)).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: without this no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.02)
    use_lean_layers(model, "lean")
    ids = load_tokenizer(spec)(TEXT)["input_ids"]
    row = {"input_ids": ids * 2, "labels": [IGNORED, *ids[1:]] * 2, "seq_lengths": [len(ids)] * 2}

    def gradients(policy: Policy, *, packed: bool = False) -> dict[str, torch.Tensor]:
        checkpoint_activations(model, policy)
        model.zero_grad()
        with watch_recompute(model) as watch:
            model(**collate([row], 0, padding_free=packed)).loss.backward()
        watch.verify(policy)
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(Policy(LAYERS, LAYERS))
    assert len(expected) == LAYERS * 7 * 2
    assert all(gradient.isfinite().all() and gradient.any() for gradient in expected.values())
    for policy in RECOMPUTING:
        got = gradients(policy)
        assert all(torch.equal(got[name], expected[name]) for name in expected), policy
    model.set_attn_implementation(PACKED_ATTENTION)
    for policy in IN_TILES:
        got = gradients(policy, packed=True)
        worst = max(((got[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)
        print(f"{bits} bits, {policy}: gradients differ by {worst:.1e} of their norm")
        assert worst <= U * ADDITIONS**0.5, policy
