"""The divergence of two models' next-token distributions, beside logits of all tokens at once in float64."""

import pytest
import torch

from common.model import divergence
from common.model.divergence import head_divergence

HIDDEN, VOCABULARY, POSITIONS = 32, 500, 37


def states(moved: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(POSITIONS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    return base, base + moved * torch.randn(POSITIONS, HIDDEN, generator=generator), weight, targets


def in_float64(base, hidden, weight, targets) -> list[float]:
    base_log, log = ((states.double() @ weight.double().t()).log_softmax(-1) for states in (base, hidden))
    kl = torch.nn.functional.kl_div(log, base_log, reduction="sum", log_target=True)  # KL(base || model)
    return [kl.item(), *(-of.gather(-1, targets[:, None]).sum().item() for of in (base_log, log))]


@pytest.mark.parametrize("rows", [1, 10, 1000])
@pytest.mark.parametrize("moved", [0.003, 0.1, 3.0])
def test_it_is_that_of_all_logits_in_float64(monkeypatch, rows, moved):
    """Whatever the tile. KL is not symmetric: the other direction differs from this one by more than the tolerance."""
    monkeypatch.setattr(divergence, "DIVERGENCE_TILE_ENTRIES", rows * VOCABULARY)
    base, hidden, weight, targets = states(moved)
    found, wanted = head_divergence(base, hidden, weight, targets), in_float64(base, hidden, weight, targets)
    # fp32: each of 500 terms of KL is rounded by about 1e-7 of a probability, whose sum is 1
    assert found.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6 * POSITIONS)
    other = in_float64(hidden, base, weight, targets)[0]
    if moved > 0.1:
        assert abs(other - wanted[0]) > 1e-3 * wanted[0]


def test_equal_states_have_none_and_equal_losses():
    base, _, weight, targets = states(0)
    kl, base_nll, nll = head_divergence(base, base.clone(), weight, targets).tolist()
    assert kl == 0 and base_nll == nll > 0


@pytest.mark.parametrize("moved", [1e-7, 1e-5, 1e-3, 1.0, 30.0])
def test_no_divergence_is_below_0(moved):
    """Rounding would make the smallest ones so. The largest logits here are some thousands: probabilities of 0."""
    base, hidden, weight, targets = states(moved)
    for base_hidden, model_hidden in ((base, hidden), (10 * hidden, base), (base.bfloat16(), hidden.bfloat16())):
        found = head_divergence(base_hidden, model_hidden, weight.to(base_hidden.dtype), targets)
        assert found.isfinite().all() and found[0] >= 0
