"""The first optimizer step shows whether the layers recompute as the checkpointing policy says."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from common.model.activation_checkpointing import Policy, RecomputeWatch, watch_recompute


class RecomputeCheck(TrainerCallback):
    """Counts how often each layer runs in the first optimizer step, and verifies it when the step ends.

    policy: returns the one in effect. A run in which a layer does not recompute as planned stops with RuntimeError.
    """

    def __init__(self, model: PeftModel, policy: Callable[[], Policy]) -> None:
        self.model, self.policy = model, policy
        self.watch: RecomputeWatch | None = None
        self._watching = ExitStack()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch = self._watching.enter_context(watch_recompute(self.model))

    def count_again(self) -> None:
        """Counts from zero: for a step that is computed again, and after an evaluation in the middle of it."""
        if self.watch is not None:
            self._watching.close()
            self.watch = self._watching.enter_context(watch_recompute(self.model))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.watch is not None and self.watch.micro_batches:
            self._watching.close()
            self.watch.verify(self.policy())
            self.watch = None
