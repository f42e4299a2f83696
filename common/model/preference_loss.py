"""Losses that learn from better and worse answers: DPO, IPO, SimPO, ORPO and KTO (PreferenceSpec has the formulas).

They need neither logits nor a second model: the fused loss gives the log-likelihood of each token with its gradient,
and the reference's log-likelihoods are computed once, before the run, and come with the batch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from common.data.batches import EXAMPLE_IDS, KL, PREFERENCE_ENTRIES, REFERENCE, SIGNS, Batch
from common.recipe import PreferenceSpec

# ORPO's odds have no number for an answer of probability 1, whose NLL fp32 rounds to 0. Half a unit in its last place.
MOST_CERTAIN = -(2.0**-25)


class Likelihoods(NamedTuple):
    """Of each example's answer: its log-likelihood in nats, float64 (examples,), and its number of tokens."""

    total: Tensor
    tokens: Tensor


class LossAndRewards(NamedTuple):
    """loss: the sum over the pairs, or for KTO over the answers, of a micro-batch; scalar, float64.

    rewards: of each example, float64 (examples,), without a gradient: beta times how much likelier it has become than
    under the reference, or where there is none beta times its log-likelihood.
    """

    loss: Tensor
    rewards: Tensor
    likelihoods: Likelihoods  # without a gradient


def answer_likelihoods(model: Any, batch: Batch) -> Likelihoods:
    """The log-likelihood of each example's trained tokens, differentiable. batch: with example_ids and signs."""
    inputs = {name: value for name, value in batch.items() if name not in PREFERENCE_ENTRIES}
    nll: Tensor = model(**inputs, per_token=True).loss
    ids = batch[EXAMPLE_IDS].flatten()[batch["trained_positions"] + 1]
    # float64: a difference of hundreds of nats is what is learnt from.
    none = torch.zeros(len(batch[SIGNS]), dtype=torch.float64, device=nll.device)
    return Likelihoods(none.index_add(0, ids, -nll.double()), none.index_add(0, ids, torch.ones_like(nll).double()))


def preference_loss(model: Any, batch: Batch, spec: PreferenceSpec) -> LossAndRewards:
    """Forward pass of a micro-batch with its preference loss.

    batch: of collate, with example_ids and signs, with reference where the spec needs it, and for KTO with kl.
    """
    found = answer_likelihoods(model, batch)
    scores, reference = found.total, batch[REFERENCE] if spec.needs_reference else torch.zeros_like(found.total)
    if spec.value("length_normalized") or spec.loss == "orpo":
        count = found.tokens.clamp(min=1)
        scores, reference = scores / count, reference / count
    ratios, beta = scores - reference, spec.value("beta")
    if spec.loss == "kto":
        losses = _kto(ratios, batch[SIGNS], batch[KL], spec)
    else:
        losses = _of_pairs(scores, ratios, spec)
        if weight := spec.value("sft_weight"):
            losses = losses - weight * (found.total / found.tokens.clamp(min=1))[0::2]
    return LossAndRewards(losses.sum(), beta * ratios.detach(), Likelihoods(found.total.detach(), found.tokens))


def _of_pairs(scores: Tensor, ratios: Tensor, spec: PreferenceSpec) -> Tensor:
    """The loss of each pair: (pairs,). scores and ratios: (2 * pairs,), chosen and rejected in turn."""
    beta, margins = spec.value("beta"), ratios[0::2] - ratios[1::2]
    if spec.loss == "ipo":
        return (margins - 1 / (2 * beta)).square()
    if spec.loss == "orpo":
        sure = scores.clamp(max=MOST_CERTAIN)
        log_odds = sure - torch.log(-torch.expm1(sure))
        return -beta * logsigmoid(log_odds[0::2] - log_odds[1::2])
    logits, smoothing = beta * margins - spec.value("gamma"), spec.value("label_smoothing")
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def _kto(ratios: Tensor, signs: Tensor, kl: Tensor, spec: PreferenceSpec) -> Tensor:
    """The loss of each answer: (examples,)."""
    weights = torch.where(signs > 0, spec.value("desirable_weight"), spec.value("undesirable_weight"))
    return weights * (1 - torch.sigmoid(signs * spec.value("beta") * (ratios - kl)))
