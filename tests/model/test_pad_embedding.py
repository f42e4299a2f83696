"""Padding changes nothing, whatever the pad token's embedding holds."""

import pytest
import torch

from common.data.batches import collate
from common.data.packing import pack
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.model.pad_embedding import mend_pad_embedding
from common.recipe import LoraSpec, ModelSpec
from tests.conftest import FP32
from tests.data.test_packing import tokens

ROWS = [*pack([tokens(20), tokens(15, 200)], 64), *pack([tokens(9, 400)], 64), *pack([tokens(30, 500)], 64)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e15])
@pytest.mark.parametrize(("attention", "kernels"), [("sdpa", "lean"), ("sdpa", "stock"), ("eager", "stock")])
def test_padding_changes_neither_loss_nor_gradient(small_llama, bad, attention, kernels, capsys):
    """Rows of 35, 9 and 30 tokens in one micro-batch, against each row alone, which has no padding."""
    spec = ModelSpec(str(small_llama))
    tokenizer, model = load_tokenizer(spec), attach_lora(load_4bit(spec, FP32), LoraSpec(rank=4, alpha=8)).train()
    use_lean_layers(model, kernels)
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.get_input_embeddings().weight.data[tokenizer.pad_token_id] = bad
    mend_pad_embedding(model, tokenizer)
    assert ("it counts as zero here" in capsys.readouterr().out) == (bad != 1e15)
    found = []
    for batches in ([ROWS], [[row] for row in ROWS]):
        model.zero_grad()
        losses = [model(**collate(rows, tokenizer.pad_token_id), num_items_in_batch=71).loss for rows in batches]
        sum(losses).backward()
        found.append((sum(losses).item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    (padded, gradients), (alone, expected) = found
    assert padded == pytest.approx(alone, rel=1e-5)
    for name, gradient in expected.items():  # sums in another order, in fp32
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_a_finite_row_stays_as_it_is(small_llama, capsys):
    spec = ModelSpec(str(small_llama))
    tokenizer, model = load_tokenizer(spec), load_4bit(spec, FP32)
    before = model.get_input_embeddings().weight.detach().clone()
    mend_pad_embedding(model, tokenizer)
    assert torch.equal(model.get_input_embeddings().weight, before) and capsys.readouterr().out == ""
