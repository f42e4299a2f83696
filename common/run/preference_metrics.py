"""What a run with preferences measures of its micro-batches: sums on the device, and what they say."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.data.batches import Batch
from common.model.preference_loss import KL, SIGNS, LossAndRewards
from common.recipe import PreferenceSpec

# Names in metrics.jsonl and in trackers; those of rewards are TRL's. Of the held-out rows they begin with "eval_".
ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"
REWARDS = {1: "rewards/chosen", -1: "rewards/rejected"}
NLLS = {1: "nll/chosen", -1: "nll/rejected"}  # nats a token
HELD_OUT = "eval_"
COUNT = 11  # numbers of metric_sums


def metric_sums(result: LossAndRewards, batch: Batch, spec: PreferenceSpec) -> Tensor:
    """Sums over a micro-batch, float64 (COUNT,), on the device: the loss, the comparisons, those that came out right;
    then of the chosen (good) answers, and after them of the rejected (bad) ones, their number, rewards, NLL, tokens.

    A comparison is a pair, and right where the chosen answer has the larger reward. For KTO it is an answer, and right
    where its reward lies on its side of what it is compared with. A tie counts half: before the first step all are.
    """
    signs, rewards, likelihoods = batch[SIGNS], result.rewards, result.likelihoods
    if spec.loss == "kto":
        ahead = signs * (rewards - spec.value("beta") * batch[KL])
    else:
        ahead = rewards[0::2] - rewards[1::2]
    right = (ahead > 0).sum() + 0.5 * (ahead == 0).sum()
    found = [result.loss.detach(), ahead.new_tensor(len(ahead)), right]
    for sign in (1, -1):
        own = (signs * sign > 0).double()
        values = (torch.ones_like(rewards), rewards, -likelihoods.total, likelihoods.tokens)
        found += [(value * own).sum() for value in values]
    return torch.stack([value.double() for value in found])


def metrics_of(sums: Sequence[float]) -> dict[str, float]:
    """Means by their names. sums: metric_sums of some micro-batches, added up.

    A mean over nothing has no entry: KTO's answers of a step may all be good.
    """
    _, comparisons, right, *of_answers = sums
    found: dict[str, float] = {}
    for sign, (answers, rewards, nll, tokens) in ((1, of_answers[:4]), (-1, of_answers[4:])):
        if answers:
            found |= {REWARDS[sign]: rewards / answers, NLLS[sign]: nll / max(tokens, 1)}
    if len(found) == 4:
        found[MARGIN] = found[REWARDS[1]] - found[REWARDS[-1]]
    if comparisons:
        found[ACCURACY] = right / comparisons
    return found


def mean_loss(sums: Sequence[float]) -> float:
    return sums[0] / max(sums[1], 1)


def is_metric(name: str) -> bool:
    """Whether it is the name of one of these metrics, of training or of the held-out rows."""
    return name.removeprefix(HELD_OUT).startswith(("rewards/", "nll/", "kl"))


def taken_from(logs: dict[str, Any]) -> dict[str, float]:
    """These metrics of what a trainer logs."""
    return {name: value for name, value in logs.items() if is_metric(name)}


def in_words(metrics: dict[str, Any], prefix: str = "") -> str:
    """Accuracy and margin for a line, with " | " before them; an empty text where there are none."""
    accuracy, margin = metrics.get(prefix + ACCURACY), metrics.get(prefix + MARGIN)
    parts = [] if accuracy is None else [f"accuracy {accuracy:.0%}"]
    parts += [] if margin is None else [f"margin {margin:.3f}"]
    return "".join(f" | {part}" for part in parts)
