"""Packed rows under every attention that runs on a CPU: no token sees another example of its row."""

import pytest
import torch
from transformers import LlamaConfig

from common.data.batches import collate
from common.data.packing import pack
from common.model import attention
from common.model.attention import PACKED_ATTENTION, attention_of
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.recipe import LoraSpec, ModelSpec
from common.tokens.labels import trained_positions
from tests.conftest import ARCHITECTURES, FP32
from tests.data.test_batches import flash_attention_in_torch
from tests.data.test_packing import tokens

EXAMPLES = (tokens(20, first=10), tokens(15, first=200))


@pytest.mark.parametrize(  # lean layers know no eager attention: no machine asks for it
    ("backend", "kernels"),
    [("sdpa", "lean"), ("sdpa", "stock"), ("eager", "stock"), (PACKED_ATTENTION, "lean"), (PACKED_ATTENTION, "stock")],
)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral with a window"])
def test_the_second_document_is_unmoved_by_the_first(small_model, architecture, backend, kernels, monkeypatch):
    """Its logits, its loss and the gradient of its loss, with other tokens before it, and alone in its row."""
    monkeypatch.setattr(attention, "varlen_attn", flash_attention_in_torch)  # the kernel needs a GPU
    window = {"sliding_window": 8} if "window" in architecture else {}
    folder = small_model(architecture.split()[0], **window)
    model = attach_lora(load_4bit(ModelSpec(str(folder)), FP32), LoraSpec(rank=4, alpha=8)).train()
    use_lean_layers(model, kernels)
    model.set_attn_implementation(backend)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    found = []
    for first in (EXAMPLES[0], tokens(20, first=700), None):
        (row,) = pack([*([first] if first else []), EXAMPLES[1]], 64)
        batch = collate([row], 0, padding_free=backend == PACKED_ATTENTION)
        before = 20 if first else 0
        batch["labels"][:, :before] = -100
        batch["trained_positions"] = trained_positions(batch["labels"])
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "trained_positions")}
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0]
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        found.append((logits[:before], logits[before:], loss.item(), gradients))
    assert not torch.allclose(found[0][0], found[1][0], atol=0.1)  # the first document did change
    for _, logits, loss, gradients in found[1:]:
        torch.testing.assert_close(logits, found[0][1], rtol=0, atol=1e-5 * found[0][1].abs().max().item())
        assert loss == pytest.approx(found[0][2], rel=1e-5)
        for name, gradient in found[0][3].items():  # sums over more zeros, in another order
            torch.testing.assert_close(
                gradients[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item() + 1e-9
            )


@pytest.mark.parametrize(
    ("capability", "values", "expected"),
    [
        ((8, 0), {}, PACKED_ATTENTION),
        ((12, 0), {"head_dim": 256}, PACKED_ATTENTION),
        ((7, 5), {}, "sdpa"),
        ((8, 0), {"hidden_size": 3200, "num_attention_heads": 32}, "sdpa"),  # OpenLLaMA 3B: heads of 100
        ((8, 0), {"head_dim": 512}, "sdpa"),
        ((8, 0), {"attention_dropout": 0.1}, "sdpa"),
    ],
)
def test_a_model_that_flash_attention_does_not_take_has_another(capability, values, expected):
    """torch would say so in the first step, when the model is loaded already."""
    assert attention_of(capability, LlamaConfig(**values)) == expected
