"""The losses by TRL 1.16's own code on the same log-likelihoods, and where their formulas have no number."""

import importlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from common.data.batches import EXAMPLE_IDS, KL, REFERENCE, SIGNS, Batch
from common.model.preference_loss import preference_loss
from common.recipe import PreferenceSpec

PAIRS, TOKENS = 5, 6  # pairs, and the most tokens of an answer


class Told:
    """A model whose log-likelihood of each trained token is given."""

    def __init__(self, log_likelihoods: Tensor) -> None:
        self.log_likelihoods = log_likelihoods

    def __call__(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(loss=-self.log_likelihoods)


def made(signs: list[float], seed: int = 0) -> tuple[Tensor, Tensor, Batch]:
    """Log-likelihoods of tokens, one row an answer; which of them are there; and the same as a micro-batch."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, TOKENS + 1, (len(signs),))
    tokens = -2 * torch.rand(len(signs), TOKENS, dtype=torch.float64)
    mask = torch.arange(TOKENS) < lengths[:, None]
    ids = torch.arange(len(signs)).repeat_interleave(lengths)
    batch = {
        EXAMPLE_IDS: torch.cat([torch.zeros(1, dtype=torch.long), ids])[None],
        "trained_positions": torch.arange(len(ids)),
        SIGNS: torch.tensor(signs),
        REFERENCE: (tokens * mask).sum(1) + torch.randn(len(signs), dtype=torch.float64),
    }
    return tokens, mask, batch


def of_pairs() -> tuple[Tensor, Tensor, Batch]:
    return made([1.0, -1.0] * PAIRS)


def ours(tokens: Tensor, mask: Tensor, batch: Batch, spec: PreferenceSpec) -> Any:
    return preference_loss(Told(tokens[mask]), batch, spec)


class Outputs(SimpleNamespace):
    """What TRL's fused head returns; of it only the log-likelihoods matter here."""


def trl_model(tokens: Tensor) -> Any:
    """A model whose tokens after the first have these log-likelihoods."""
    nothing = torch.zeros_like(tokens)
    outputs = Outputs(log_probs=tokens, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    return lambda **_: outputs


def trl(trainer: type, **values: Any) -> Any:
    """An object with the trainer's methods, and of its state what its loss reads."""
    made = object.__new__(trainer)
    made.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    made.model = SimpleNamespace(training=False)
    made._metrics = {"eval": _Lists()}
    made._total_train_tokens = 0
    made.aux_loss_enabled = False
    made.precompute_ref_logps = True
    for name, value in values.items():
        setattr(made, name, value)
    return made


def experimental(name: str) -> type:
    """A trainer of trl.experimental, which warns of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: type = getattr(importlib.import_module(f"trl.experimental.{name.lower()}"), f"{name}Trainer")
    return found


class _Lists(dict):
    def __missing__(self, name: str) -> list:
        return self.setdefault(name, [])


def in_halves(values: Tensor) -> Tensor:
    """TRL has all chosen answers first."""
    return torch.cat([values[0::2], values[1::2]])


@pytest.mark.parametrize(
    ("spec", "loss_type"),
    [
        (PreferenceSpec("dpo", beta=0.3), "sigmoid"),
        (PreferenceSpec("dpo", beta=0.3, length_normalized=True), "sigmoid_norm"),
        (PreferenceSpec("ipo", beta=0.3), "ipo"),
    ],
)
def test_dpo_and_ipo_are_those_of_trl(spec, loss_type):
    tokens, mask, batch = of_pairs()
    own = trl(
        DPOTrainer,
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=spec.value("label_smoothing"),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    shifted = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], 1)  # the first token is a prompt
    reference = in_halves(batch[REFERENCE]).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(shifted, dtype=torch.long),
        "attention_mask": torch.ones_like(shifted),
        "completion_mask": in_halves(shifted.long()),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    expected = own._compute_loss(trl_model(in_halves(tokens * mask)), inputs, False)
    got = ours(tokens, mask, batch, spec)
    assert got.loss.item() / PAIRS == pytest.approx(expected.item(), rel=1e-7)
    if not spec.value("length_normalized"):
        assert got.rewards[0::2].mean().item() == pytest.approx(own._metrics["eval"]["rewards/chosen"][0], rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_is_that_of_trl(smoothing):
    tokens, mask, batch = of_pairs()
    spec = PreferenceSpec("simpo", beta=2.5, gamma=0.7, label_smoothing=smoothing)
    means = (tokens * mask).sum(1) / mask.sum(1)
    own = trl(experimental("CPO"), alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.5, label_smoothing=smoothing)
    losses, chosen, rejected = own.cpo_loss(means[0::2], means[1::2])
    got = ours(tokens, mask, batch, spec)
    assert got.loss.item() == pytest.approx(losses.sum().item(), rel=1e-7)
    torch.testing.assert_close(got.rewards, torch.stack([chosen, rejected], 1).flatten())


def test_orpo_is_that_of_trl():
    tokens, mask, batch = of_pairs()
    means = (tokens * mask).sum(1) / mask.sum(1)
    losses, *_ = trl(experimental("ORPO"), beta=0.3).odds_ratio_loss(means[0::2], means[1::2])
    expected = -means[0::2] - losses  # the NLL of the chosen answers; TRL adds it elsewhere, over the tokens of a batch
    got = ours(tokens, mask, batch, PreferenceSpec("orpo", beta=0.3))
    assert got.loss.item() == pytest.approx(expected.sum().item(), rel=1e-6)  # TRL computes in fp32


def test_kto_is_that_of_trl():
    signs = [1.0, 1.0, -1.0, 1.0, -1.0]
    tokens, mask, batch = made(signs)
    batch[KL] = torch.tensor(0.37, dtype=torch.float64)
    own = trl(
        KTOTrainer,
        loss_type="kto",
        calculate_KL=True,
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda *_: torch.tensor([0.37], dtype=torch.float64),
    )
    shifted = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], 1)
    inputs = {
        "input_ids": torch.zeros_like(shifted, dtype=torch.long),
        "attention_mask": torch.ones_like(shifted),
        "completion_mask": shifted.long(),
        "label": torch.tensor(signs) > 0,
        "ref_logps": batch[REFERENCE],
        "ref_KL_logps": torch.zeros(1, dtype=torch.float64),
    }
    expected = own._compute_loss(trl_model(tokens * mask), inputs, False)
    spec = PreferenceSpec("kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    got = ours(tokens, mask, batch, spec)
    assert got.loss.item() / len(signs) == pytest.approx(expected.item(), rel=1e-7)
    assert got.rewards[batch[SIGNS] > 0].mean().item() == pytest.approx(
        own._metrics["eval"]["rewards/chosen"][0], rel=1e-6
    )


@pytest.mark.parametrize("certain", [0.0, 1e-7], ids=["probability 1", "above it, as fp32 rounds"])
def test_orpo_has_numbers_for_an_answer_that_is_certain(certain):
    """Its odds are infinite, and their gradient no number: it would skip the step."""
    tokens, mask, batch = of_pairs()
    tokens[0] = certain
    tokens.requires_grad_()
    loss = ours(tokens, mask, batch, PreferenceSpec("orpo")).loss
    loss.backward()
    assert loss.isfinite() and tokens.grad.isfinite().all()
    assert tokens.grad[0][mask[0]].unique().tolist() == [-1 / mask[0].sum().item()]  # that of its NLL is left
