import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from common.model import loss
from common.model.loss import fuse_head_and_loss, head_loss
from common.tokens.labels import IGNORED, trained_positions
from tests.conftest import ARCHITECTURES


@pytest.mark.parametrize("tile_rows", [1, 3, 100])
def test_loss_and_gradient_are_those_of_float64(tile_rows, monkeypatch):
    monkeypatch.setattr(loss, "TILE_ENTRIES", tile_rows * 50)
    torch.manual_seed(0)
    hidden = torch.randn(11, 7, requires_grad=True)
    weight = torch.randn(50, 7)
    positions, targets = torch.tensor([0, 2, 3, 5, 6, 9, 10]), torch.randint(50, (7,))
    total = head_loss(hidden, weight, positions, targets)
    (total / 3).backward()
    exact = hidden.detach().double().requires_grad_()
    expected = cross_entropy(exact[positions] @ weight.double().T, targets, reduction="sum")
    (expected / 3).backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert not hidden.grad[[1, 4, 7, 8]].any()  # nobody trains what follows them


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    total = head_loss(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), torch.tensor([0, 0]))
    total.backward()
    assert total.item() == 400.0  # 0 for the first, 200 - (-200) for the second
    assert hidden.grad.tolist() == [[0.0], [-2.0]]


def test_nothing_to_train_is_a_loss_of_zero():
    hidden = torch.randn(3, 4, requires_grad=True)
    nothing = torch.tensor([], dtype=torch.int64)
    total = head_loss(hidden, torch.randn(9, 4), nothing, nothing)
    total.backward()
    assert total.item() == 0.0
    assert not hidden.grad.any()


def test_trained_positions_stay_within_their_row():
    labels = torch.tensor([[IGNORED, 5, IGNORED, 6], [7, IGNORED, 8, 9]])
    # 0 foretells the 5, 2 the 6; the 7 begins a row; 5 foretells the 8, 6 the 9
    assert trained_positions(labels).tolist() == [0, 2, 5, 6]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fused_model_has_the_loss_and_gradients_of_the_stock_one(small_model, architecture):
    model = AutoModelForCausalLM.from_pretrained(small_model(architecture), dtype=torch.float32)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    ids = torch.arange(10, 74).view(2, 32)
    labels = ids.masked_fill(ids % 3 == 0, IGNORED)
    results = []
    for fused in (False, True):
        if fused:
            fuse_head_and_loss(model)
        model.zero_grad()
        value = model(input_ids=ids, labels=labels).loss
        value.backward()
        results.append((value.detach(), model.get_input_embeddings().weight.grad.clone()))
    (stock, expected), (value, gradient) = results
    torch.testing.assert_close(value, stock, rtol=1e-6, atol=0)
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()  # fp32 sums in another order
    part = model(input_ids=ids, labels=labels, num_items_in_batch=1000).loss
    torch.testing.assert_close(part * 1000, stock * len(trained_positions(labels)))


def test_without_labels_the_model_is_what_it_was(small_llama):
    model = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    fuse_head_and_loss(model)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_it_saves_only_the_gradient():
    hidden = torch.randn(6, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        head_loss(hidden, torch.randn(9, 4), torch.arange(6), torch.zeros(6, dtype=torch.int64))
    assert saved == [(6, 4)]
