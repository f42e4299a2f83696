"""Forward passes of micro-batches with preferences: held-out metrics, KTO's point of comparison, log-likelihoods."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from common.data.batches import KL, REFERENCE, SIGNS, Batch
from common.data.mismatched import MISMATCHED
from common.machine.collectives import all_reduce_sum
from common.machine.device import this_machine
from common.machine.processes import world_size
from common.machine.slow_work import report_slow_work
from common.model.preference_loss import Likelihoods, LossAndRewards, answer_likelihoods, preference_loss
from common.recipe import PreferenceSpec
from common.run.held_out_loss import fill_up, forward_only, on_device, own_batches
from common.run.preference_metrics import HELD_OUT, mean_loss, metrics_of

COUNT = 11  # numbers of metric_sums
# Computes a function of micro-batches on one of them: at once, or with less memory where it does not suffice.
Compute = Callable[[Callable[[Batch], Tensor], Batch], Tensor]


def at_once(part: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    return part(batch)


def metric_sums(result: LossAndRewards, batch: Batch, spec: PreferenceSpec) -> Tensor:
    """Sums over a micro-batch, float64 (COUNT,), on the device: the loss, the comparisons, those that came out right;
    then of the chosen (good) answers, and after them of the rejected (bad) ones, their number, rewards, NLL, tokens.

    A comparison is a pair, and right where the chosen answer has the larger reward. For KTO it is an answer, and right
    where its reward lies on its side of what it is compared with. A tie counts half: before the first step all are.
    """
    signs, rewards, likelihoods = batch[SIGNS], result.rewards, result.likelihoods
    if spec.kind == "rated":
        ahead = signs * (rewards - spec.value("beta") * batch[KL])
    else:
        ahead = rewards[0::2] - rewards[1::2]
    right = (ahead > 0).sum() + 0.5 * (ahead == 0).sum()
    found = [result.loss.detach(), ahead.new_full((), len(ahead)), right]  # new_tensor would wait for the GPU
    for sign in (1, -1):
        own = (signs * sign > 0).double()
        values = (torch.ones_like(rewards), rewards, -likelihoods.total, likelihoods.tokens)
        found += [(value * own).sum() for value in values]
    return torch.stack([value.double() for value in found])


def likelihoods_without_gradient(model: Any, batch: Batch) -> Likelihoods:
    """answer_likelihoods in evaluation mode, on the device."""
    with forward_only(model):
        return answer_likelihoods(model, on_device(batch))


def batch_metrics(model: Any, batch: Batch, spec: PreferenceSpec, kl: Tensor | None = None) -> Tensor:
    """metric_sums of a micro-batch in evaluation mode. kl: for KTO, what rewards are compared with."""
    batch = on_device(batch) | ({} if kl is None else {KL: kl})
    with forward_only(model):
        return metric_sums(preference_loss(model, batch, spec), batch, spec)


def log_ratio_sums(model: Any, batch: Batch) -> Tensor:
    """The sum over the examples of how much likelier each answer is than under the reference, in nats, and their
    number: float64 (2,). batch: with reference."""
    ratios = likelihoods_without_gradient(model, batch).total - on_device(batch)[REFERENCE]
    return torch.stack([ratios.sum(), ratios.new_full((), len(ratios))])


def point_of_comparison(
    model: Any, mismatched: Sequence[Batch], compute: Compute = at_once, filler: Batch | None = None
) -> Tensor:
    """KTO's z: the mean log-ratio of mismatched answers, at least 0; 0 where there are none. float64 (), on the device.

    mismatched: this process's micro-batches of them; the mean is that of all processes. filler: see fill_up.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=this_machine().device)
    for number, batch in enumerate(fill_up(mismatched, filler)):
        found = compute(partial(log_ratio_sums, model), batch)
        if number < len(mismatched):
            sums = sums + found
    if world_size() > 1:
        sums = sums.new_tensor(all_reduce_sum(sums.tolist()))
    return (sums[0] / sums[1].clamp(min=1)).clamp(min=0)


def held_out_metrics(
    model: Any,
    rows: Dataset | Sequence[dict[str, Any]],
    collate_rows: Callable[..., Batch],
    spec: PreferenceSpec,
    micro_batch_rows: int = 1,
    compute: Compute = at_once,
    filler: Batch | None = None,
) -> dict[str, float]:
    """Mean loss of a comparison (eval_loss) and metrics_of the rows, whatever the micro-batches and processes.

    For KTO the rewards are compared with the mean over all of the rows. collate_rows: for KTO with mismatched answers.
    """
    own, mismatched = own_batches(rows, collate_rows, micro_batch_rows), list[Batch]()
    if spec.loss == "kto":
        own = list(own)
        mismatched = [batch.pop(MISMATCHED) for batch in own if MISMATCHED in batch]
    totals = torch.zeros(COUNT, dtype=torch.float64, device=this_machine().device)
    with report_slow_work("held-out loss", len(rows), "rows") as work:
        kl = point_of_comparison(model, mismatched, compute, filler) if spec.kind == "rated" else None
        for number, batch in enumerate(fill_up(own, filler)):
            found = compute(lambda part: batch_metrics(model, part, spec, kl), batch)
            if number < len(own):
                totals = totals + found
                work.done = min(len(rows), (number + 1) * micro_batch_rows * world_size())
    sums = all_reduce_sum(totals.tolist())
    return {"eval_loss": mean_loss(sums)} | {HELD_OUT + name: value for name, value in metrics_of(sums).items()}
