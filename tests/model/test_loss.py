from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from common.model import loss
from common.model.loss import fuse_head_and_loss, head_loss
from common.plan.ledger import Ledger
from common.tokens.labels import IGNORED, trained_positions
from tests.conftest import ARCHITECTURES


@pytest.mark.parametrize("tile_rows", [1, 3, 100])
def test_loss_and_gradient_are_those_of_float64(tile_rows, monkeypatch):
    monkeypatch.setattr(loss, "TILE_ENTRIES", tile_rows * 50)
    torch.manual_seed(0)
    hidden = torch.randn(11, 7, requires_grad=True)
    weight = torch.randn(50, 7)
    positions, targets = torch.tensor([0, 2, 3, 5, 6, 9, 10]), torch.randint(50, (7,))
    total = head_loss(hidden, weight, positions, targets).sum()
    (total / 3).backward()
    exact = hidden.detach().double().requires_grad_()
    expected = cross_entropy(exact[positions] @ weight.double().T, targets, reduction="sum")
    (expected / 3).backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert not hidden.grad[[1, 4, 7, 8]].any()  # nobody trains what follows them


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    total = head_loss(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), torch.tensor([0, 0])).sum()
    total.backward()
    assert total.item() == 400.0  # 0 for the first, 200 - (-200) for the second
    assert hidden.grad.tolist() == [[0.0], [-2.0]]


def test_nothing_to_train_is_a_loss_of_zero():
    hidden = torch.randn(3, 4, requires_grad=True)
    nothing = torch.tensor([], dtype=torch.int64)
    total = head_loss(hidden, torch.randn(9, 4), nothing, nothing).sum()
    total.backward()
    assert total.item() == 0.0
    assert not hidden.grad.any()


def test_trained_positions_stay_within_their_row():
    labels = torch.tensor([[IGNORED, 5, IGNORED, 6], [7, IGNORED, 8, 9]])
    # 0 foretells the 5, 2 the 6; the 7 begins a row; 5 foretells the 8, 6 the 9
    assert trained_positions(labels).tolist() == [0, 2, 5, 6]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fused_model_has_the_loss_and_gradients_of_the_stock_one(small_model, architecture):
    folder = small_model(architecture, tie_word_embeddings=False)  # a tied embedding has the frozen head's gradient too
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
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


def test_it_saves_only_the_gradient_and_its_positions():
    hidden = torch.randn(6, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        head_loss(hidden, torch.randn(9, 4), torch.arange(6), torch.zeros(6, dtype=torch.int64))
    assert saved == [(6, 4), (6,)]


class Matmuls(TorchDispatchMode):
    """Notes the rows of each matmul, and whether the GPU's may add up 16-bit numbers in 16 bits (bf16, fp16)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.in_16_bits: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten.mm.default:
            allowed = torch.backends.cuda.matmul
            self.rows.append(len(args[0]))
            self.in_16_bits.append(
                (allowed.allow_bf16_reduced_precision_reduction, allowed.allow_fp16_reduced_precision_reduction)
            )
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [
        (128_256, [512, 512, 276]),  # Llama 3: 523 fit
        (152_064, [384, 384, 384, 148]),  # Qwen 2.5: 441 fit
        (262_144, [256] * 5 + [20]),
        (49_152, [1280, 20]),
        (1_000_000, [67] * 19 + [27]),  # fewer than 128 fit
    ],
)
def test_a_tile_is_a_multiple_of_what_a_program_of_a_matmul_computes(vocabulary, rows):
    with FakeTensorMode(), Matmuls() as matmuls:
        index = torch.empty(1300, dtype=torch.int64)
        head_loss(torch.empty(1300, 8), torch.empty(vocabulary, 8), index, index)
    assert matmuls.rows == rows


def test_the_loss_allocates_a_tile_in_16_bits_and_no_more_of_its_size():
    """What a plan counts for a GPU. 2,048 tokens of Llama 3's vocabulary; the head is small here and not counted."""
    with FakeTensorMode():
        hidden = torch.empty(2048, 64, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(128_256, 64, dtype=torch.bfloat16)
        positions = torch.empty(2048, dtype=torch.int64)
        with Ledger([hidden, weight, positions]) as ledger:
            head_loss(hidden, weight, positions, positions).sum().backward()
    rise = max(segment.rise for segment in ledger.segments())
    assert 0 <= rise - 2 * 512 * 128_256 <= 2**20
    # The kernel reads the logits twice and writes them once; that is 3 of 5 passes over them, the matmuls have 2.
    assert sum(traffic for _, traffic in ledger.work[-1].operators) >= 5 * 2 * 2048 * 128_256


def test_matmuls_of_the_loss_add_in_fp32_and_all_others_as_torch_is_set():
    hidden, weight, index = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4), torch.arange(3)
    with Matmuls() as matmuls:
        head_loss(hidden, weight, index, index)
        torch.mm(hidden, weight.t())
    assert matmuls.in_16_bits == [(False, False), (False, False), (True, True)]


def test_in_fp16_the_gradient_of_a_token_that_is_nearly_certain_is_not_lost():
    """Its other tokens have 2e-8 each, which fp16 has no number for: without a scale they would all be 0."""
    hidden = torch.zeros(1, 2, dtype=torch.float16)
    hidden[0, 0] = 1.0
    hidden.requires_grad_()
    weight = torch.ones(50_000, 2, dtype=torch.float16)
    weight[:, 0] = 0.0
    weight[7] = torch.tensor([17.73, 0.0])  # the target has a probability of 0.999
    total = head_loss(hidden, weight, torch.tensor([0]), torch.tensor([7])).sum()
    (total * 64).backward()  # as a scaler of gradients does
    exact = hidden.detach().double().requires_grad_()
    (64 * cross_entropy(exact @ weight.double().T, torch.tensor([7]))).backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=2e-3, atol=0)


def test_what_comes_from_above_is_not_rounded_to_the_gradients_dtype():
    """1 / 3000 is 0.2 % away from the nearest number of bf16, for all tokens alike."""
    hidden = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    weight, index = torch.randn(50, 16, dtype=torch.bfloat16), torch.arange(8)
    total = head_loss(hidden, weight, index, index).sum()
    (unscaled,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (total / 3000).backward()
    assert torch.equal(hidden.grad, (unscaled.float() / 3000).bfloat16())
