"""The trainer of a run that learns from better and worse answers (Recipe.preference).

The loss is the sum over the pairs, or for KTO over the rated answers, of an optimizer step, divided by their number: it
is the same however micro-batches and processes share them. What else a step does is in common.run.trainer.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.data.batches import KL, PREFERENCE_ENTRIES, SIGNS, Batch
from common.data.mismatched import MISMATCHED, collate_with_mismatched
from common.machine.collectives import all_reduce_sum
from common.machine.processes import world_size
from common.model.preference_loss import preference_loss
from common.recipe import PreferenceSpec
from common.run.preference_advice import CollapseWatch
from common.run.preference_evaluation import COUNT, held_out_metrics, metric_sums, point_of_comparison
from common.run.preference_metrics import metrics_of
from common.run.trainer import Trainer


class PreferenceTrainer(Trainer):
    """As Trainer, on micro-batches of pairs or of rated answers, with the spec's loss.

    Rows have signs, and where the loss needs a reference its log-likelihoods (common.run.reference).
    """

    def __init__(self, *arguments: Any, preference: PreferenceSpec, **named: Any) -> None:
        self.preference = preference
        self.is_rated = preference.kind == "rated"
        if self.is_rated:
            named["data_collator"] = partial(collate_with_mismatched, collate_rows=named["data_collator"])
        super().__init__(*arguments, **named)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the comparisons of the whole step
        self.kl = self._zeros(())  # what KTO compares with, of the step under way
        self.sums, self.sums_of = self._zeros(COUNT), self.step_under_way
        self.add_callback(CollapseWatch(preference))

    def _zeros(self, shape: Any) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of an optimizer step, and the comparisons in those of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        mismatched = [batch.pop(MISMATCHED) for batch in batches if MISMATCHED in batch]
        if self.is_rated:
            self.kl = point_of_comparison(self.model, mismatched, self.compute_forward, self.filler)
            self.recompute_check.count_again()
        (answers,) = all_reduce_sum([sum(len(batch[SIGNS]) for batch in batches)])
        return batches, torch.tensor(answers if self.is_rated else answers / 2, device=device)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Of a micro-batch: its sum of losses over the comparisons of the step. Adds up what it measures.

        Times the processes, because the gradients of all of them are averaged.
        """
        assert num_items_in_batch is not None and not return_outputs
        batch = inputs | ({KL: self.kl} if self.is_rated else {})
        result = preference_loss(model, batch, self.preference)
        if self.sums_of is not self.step_under_way:
            self.sums, self.sums_of = self._zeros(COUNT), self.step_under_way
        self.sums = self.sums + metric_sums(result, batch, self.preference)
        return (result.loss * world_size() / num_items_in_batch).float()

    def begin_step_again(self) -> None:
        super().begin_step_again()
        self.sums = self._zeros(COUNT)

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """As Trainer, with the metrics of the optimizer step."""
        super().log(logs | self.step_metrics() if "loss" in logs else logs, *rest)

    def step_metrics(self) -> dict[str, float]:
        """Of the optimizer step that has ended, over all processes. Waits for the GPU, as the step's loss does."""
        sums = all_reduce_sum(self.sums.tolist())
        return metrics_of(sums) | ({"kl": float(self.kl)} if self.is_rated else {})

    # Held-out rows

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of a comparison of the held-out rows, with their rewards and how many come out right."""
        rows, size = self.eval_dataset, self.args.eval_batch_size
        metrics = held_out_metrics(
            self.model, rows, self.collate, self.preference, size, self.compute_forward, self.filler
        )
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def compute_forward(self, part: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """Computes `part`, which needs no gradient, on the micro-batch: in parts where the memory does not suffice."""
        return self.step_down.compute(part, [batch], self.state.global_step + 1, backward=False)

    def nll(self, batch: Batch) -> float:
        """As Trainer: of all trained tokens alike, whatever their answer is."""
        return super().nll({name: value for name, value in batch.items() if name not in PREFERENCE_ENTRIES})
