"""Optimizer steps whose loss or gradient norm is not finite are skipped, and the rows behind them are named."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor

from common.data.batches import Batch, split_into_examples
from common.machine.collectives import all_reduce_max
from common.recipe import UserError

MAX_SKIPPED_STEPS = 3  # in a row
MAX_SKIPPED_STEPS_FP16 = 20  # in a row with fp16's gradient scaler, which tries ever smaller scales
MAX_NAMED_ROWS = 5
ADVICE = "Lower TrainSpec.learning_rate; the last good checkpoint is kept"

FindPlaces = Callable[[list[list[int]]], list[str]]


@dataclass
class OptimizerStep:
    """What an optimizer step has computed so far."""

    number: int  # from 1
    micro_batches: list[Batch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)  # of the micro-batches: scalars


class SkippedSteps:
    """Decides after each backward pass whether the optimizer may take its step.

    nll_of_each: NLL of micro-batches in nats, one by one. find_places: where in the data the examples with these token
    ids are. last: the number of the step that was skipped last.
    """

    def __init__(
        self, model: PeftModel, nll_of_each: Callable[[list[Batch]], list[float]], find_places: FindPlaces
    ) -> None:
        self.model, self.nll_of_each, self.find_places = model, nll_of_each, find_places
        self.last = -1
        self.in_a_row = 0

    def skip_unless_finite(self, step: OptimizerStep, norm: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
        """Removes the gradients of a step without finite numbers, so that the optimizer changes nothing.

        All processes skip the step, or none. norm: of the gradients. scaler: fp16's, which skips such steps itself.
        Raises UserError when too many steps in a row were skipped, or the adapter itself is not finite.
        """
        finite = torch.stack([loss.detach() for loss in step.losses]).isfinite()
        if all_reduce_max(not bool(finite.all() & norm.isfinite())):
            self._skip(step, norm, finite, scaler)
        else:
            self.in_a_row = 0

    def _skip(self, step: OptimizerStep, norm: Tensor, finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        self.in_a_row += 1
        self.last = step.number  # also where no line says so: its numbers are shown nowhere
        limit = MAX_SKIPPED_STEPS if scaler is None else MAX_SKIPPED_STEPS_FP16
        if scaler is not None and not all_reduce_max(not bool(finite.all())) and self.in_a_row < limit:
            return  # the scaler skips the step and tries a smaller scale: it begins with too large a one
        reason = f"the gradient norm is {norm.item()}"
        if not finite.all():
            reason = f"the loss is {torch.stack(step.losses)[~finite][0].item()}"
        if not all(parameter.isfinite().all() for parameter in self.model.parameters() if parameter.requires_grad):
            raise UserError(f"step {step.number}: {reason}, and the adapter itself is no longer finite. {ADVICE}")
        if scaler is None:
            self.model.zero_grad()
        rows = self._name_rows(step, finite)
        print(f"\nwarning: step {step.number}: {reason}{rows}; the step is skipped", flush=True)
        if self.in_a_row >= limit:
            raise UserError(
                f"{limit} steps in a row gave no finite numbers, the last one {step.number}: {reason}{rows}. {ADVICE}"
            )

    def _name_rows(self, step: OptimizerStep, finite: Tensor) -> str:
        """The places of the examples to blame, in brackets; an empty text where none is found."""
        suspects = [batch for batch, good in zip(step.micro_batches, finite.tolist(), strict=True) if not good]
        examples = self._examples_to_blame(suspects or step.micro_batches)
        places = self.find_places(examples[:MAX_NAMED_ROWS])
        return f" ({'; '.join(places)}{' and more' if len(examples) > len(places) else ''})" if places else ""

    def _examples_to_blame(self, batches: list[Batch]) -> list[list[int]]:
        """Token ids of the examples whose own loss is not finite; of all in a batch where only gradients are not."""
        examples = [split_into_examples(batch) for batch in batches]
        losses = iter(self.nll_of_each([example for group in examples for example in group]))
        blamed: list[list[int]] = []
        for group in examples:
            bad = [example for example in group if not math.isfinite(next(losses))]
            blamed += [example["input_ids"][0].tolist() for example in bad or group]
        return blamed
