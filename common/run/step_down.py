"""Out of GPU memory, a run goes on with less: it recomputes more layers, then splits its micro-batches.

A backward pass that ran out of memory has already added to the gradients, and nothing tells its share from the rest.
So the gradients are zeroed and the whole optimizer step is computed again: no step is lost, and the rows of an
optimizer step stay what the recipe says.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor

from common.data.batches import Batch, halve
from common.machine.processes import world_size
from common.model.activation_checkpointing import Policy, checkpoint_activations


class StepDown:
    """Computes micro-batches, with less memory after each time that it did not suffice.

    policy: the activation checkpointing in effect. taken: every step down so far, in words. before_retry is called
    before micro-batches are computed again.
    """

    def __init__(self, model: PeftModel, policy: Policy, before_retry: Callable[[], None] = lambda: None) -> None:
        self.model, self.policy, self.before_retry = model, policy, before_retry
        self.halvings = 0  # how often each micro-batch is cut in half
        self.taken: list[str] = []

    def compute(
        self, compute_part: Callable[[Batch], Tensor], micro_batches: list[Batch], step: int, *, backward: bool
    ) -> Tensor:
        """Computes the last of the micro-batches, and returns the sum of its parts' results.

        compute_part: returns a scalar. micro_batches: those of the optimizer step so far; after a step down all of
        them are computed again. step: the number of the optimizer step, to tell the user. backward: whether
        compute_part saves activations, so that recomputing more layers helps. Raises torch.OutOfMemoryError when
        nothing is left to try, and on several processes at once, where the others would wait for this one.
        """
        pending = micro_batches[-1:]
        while True:
            try:
                for batch in pending:
                    results = [compute_part(part) for part in self.split(batch)]
                return torch.stack(results).sum()
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # its frames hold the tensors of the step that failed
            less = None if world_size() > 1 else self._step_down(micro_batches[-1], backward)
            if less is None:
                raise failure
            self.taken.append(f"step {step}: {less}")
            print(f"out of memory in step {step}; going on with {less}; rows per step stay the same")
            self.model.zero_grad()
            self.before_retry()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            pending = micro_batches

    def split(self, batch: Batch) -> list[Batch]:
        """The parts in which a micro-batch is computed."""
        parts = [batch]
        for _ in range(self.halvings):
            parts = [half for part in parts for half in halve(part)]
        return parts

    def _step_down(self, batch: Batch, backward: bool) -> str | None:
        """Changes what saves memory at the least cost in time, and says what; None when nothing is left.

        First half as many layers keep their activations, then micro-batches are halved, then the inputs of the
        recomputing layers move to host memory.
        """
        if backward and self.policy.kept:
            self.policy = replace(self.policy, kept=self.policy.kept // 2)
        elif any(len(halve(part)) == 2 for part in self.split(batch)):
            self.halvings += 1
            return f"each micro-batch in {2**self.halvings} parts"
        elif backward and not self.policy.offload:
            self.policy = replace(self.policy, offload=True)
        else:
            return None
        checkpoint_activations(self.model, self.policy)
        return str(self.policy)
