"""TRL's trainer for long runs that nobody watches. Each thing that it does beside TRL is in a module of its own:

step_down: out of memory it goes on with less. skipped_steps: it skips a step without finite numbers, and names the
rows. rehearsal: it computes the largest step before the first one. recompute_check: it verifies the checkpointing
policy in the first step. lr_schedule: its first step learns, however short the run is. held_out_loss: it weighs the
held-out loss by tokens. checkpoints: it writes them whole or not at all. library_defaults: it keeps TRL and accelerate
from changing what the recipe prepared.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer as TransformersTrainer
from transformers import TrainerCallback
from trl import SFTTrainer

from common.data.batches import TOKENS, Batch, collate_counted
from common.machine.collectives import all_reduce_sum
from common.machine.processes import is_main_process
from common.model.activation_checkpointing import Policy
from common.model.held_adapters import held_adapters
from common.model.sharding import gather_adapter, gather_states_when_saved, is_sharded, load_adapter_shards
from common.recipe import Keep
from common.run.artefacts import save_adapter
from common.run.best import HeldOutDecisions, best_step, held_out_losses
from common.run.checkpoints import staging_folder, write_checkpoint
from common.run.folder import ADAPTER_WEIGHTS
from common.run.held_out_loss import batch_nll, fill_up, mean_nll
from common.run.library_defaults import (
    keep_adapters_fp32,
    leave_sharding_alone,
    leave_training_mode,
    refuse_second_sharding,
)
from common.run.lr_schedule import build_lr_schedule, set_lr_of_next_step
from common.run.recompute_check import RecomputeCheck
from common.run.rehearsal import rehearse
from common.run.resume import finished_state
from common.run.skipped_steps import FindPlaces, OptimizerStep, SkippedSteps
from common.run.step_down import StepDown


class Trainer(SFTTrainer):
    """TRL's trainer with the parts above. Every method of TRL and transformers that it overrides is here.

    worst: a micro-batch of the longest rows, every token trained. optimizer_bytes: of the optimizer's states. run: what
    its checkpoints belong to (run_identity). find_places: where in the data the examples with these token ids are.
    keep, patience: of TrainSpec.
    """

    def __init__(
        self,
        model: PeftModel,
        policy: Policy,
        worst: Batch,
        optimizer_bytes: int = 0,
        run: dict[str, Any] | None = None,
        find_places: FindPlaces = lambda examples: [],
        keep: Keep = "last",
        patience: int | None = None,
        **arguments: Any,
    ) -> None:
        self.is_sharded = is_sharded(model)
        refuse_second_sharding(self.is_sharded, arguments["args"])
        self.collate = arguments.pop("data_collator")
        with keep_adapters_fp32(model):
            super().__init__(model, data_collator=partial(collate_counted, collate_rows=self.collate), **arguments)
        self.worst, self.optimizer_bytes, self.run = worst, optimizer_bytes, run or {}
        self.filler = worst if self.is_sharded else None  # for processes with fewer batches than others
        self.keep, self.patience = keep, patience
        self.step_under_way = OptimizerStep(0)
        self.held = held_adapters(model)
        self.recompute_check = RecomputeCheck(model, lambda: self.step_down.policy)
        self.step_down = StepDown(model, policy, before_retry=self.begin_step_again)
        self.skipped_steps = SkippedSteps(model, self.nll_of_each, find_places)
        if self.is_sharded:
            gather_states_when_saved(self.optimizer)
            leave_sharding_alone(self.accelerator)
        self.add_callback(_RehearseFirst(self))
        self.add_callback(self.recompute_check)
        self.add_callback(HeldOutDecisions(keep, patience))

    @property
    def policy(self) -> Policy:
        """The activation checkpointing in effect, after what was stepped down."""
        return self.step_down.policy

    # The optimizer step

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The recipe's schedule. The stock trainer's would begin at a learning rate of 0."""
        schedule, ratio = self.args.lr_scheduler_type, self.args.warmup_steps
        self.lr_scheduler = build_lr_schedule(self.optimizer, schedule, ratio, num_training_steps)
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of an optimizer step, and their trained tokens. Counts the tokens of all processes."""
        batches, trained_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        (tokens,) = all_reduce_sum([sum(batch.pop(TOKENS, 0) for batch in batches)])
        self.state.num_input_tokens_seen += int(tokens)
        return batches, trained_tokens

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Does nothing: get_batch_samples has counted. The stock trainer waits for the GPU after each micro-batch."""

    @cached_property
    def modules(self) -> list[nn.Module]:
        """Of the model. To walk over them takes milliseconds."""
        return list(self.model.modules())

    @cached_property
    def parameters_outside_embeddings(self) -> int:
        return int(self.model.num_parameters(exclude_embeddings=True))

    def floating_point_ops(self, inputs: Batch) -> int:
        """As the stock trainer, which counts the parameters anew for every micro-batch: two walks over the modules."""
        return 6 * int(inputs["input_ids"].numel()) * self.parameters_outside_embeddings

    def training_step(self, model: PeftModel, inputs: Batch, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Forward and backward of one micro-batch. Returns its loss, divided by the tokens of the whole step."""
        number = self.state.global_step + 1
        if self.step_under_way.number != number:
            self.step_under_way = OptimizerStep(number)
            self.held.hold(copies=not self.is_sharded)  # no adapter changes until the step's gradients are complete
        self.step_under_way.micro_batches.append(inputs)
        compute = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        with leave_training_mode(model, self.modules):
            loss = self.step_down.compute(compute, self.step_under_way.micro_batches, number, backward=True)
        self.step_under_way.losses.append(loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)  # the stock trainer's running sum would never be finite again

    def begin_step_again(self) -> None:
        """Is called before the micro-batches so far are computed again, with less memory."""
        self.recompute_check.count_again()

    def _get_grad_norm(self, model: PeftModel, grad_norm: Tensor | None = None) -> Tensor:
        """The stock trainer calls it when the gradients of a step are complete and clipped."""
        self.held.release()
        norm: Tensor = super()._get_grad_norm(model, grad_norm)
        self.skipped_steps.skip_unless_finite(self.step_under_way, norm, self.accelerator.scaler)
        return norm.nan_to_num(0.0, 0.0, 0.0)

    def compute_loss(self, model: Any, inputs: Batch, *arguments: Any, **named: Any) -> Any:
        """The model's own fused loss (common.model.loss). TRL's would compute the head once more, for its metrics."""
        return TransformersTrainer.compute_loss(self, model, inputs, *arguments, **named)

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """As TRL; for a step that was skipped it logs that instead."""
        skipped = "loss" in logs and self.skipped_steps.last == self.state.global_step
        super().log({"skipped": 1.0} if skipped else logs, *rest)

    def rehearse(self) -> None:
        """Computes the largest step there will be; weights, gradients and random numbers stay as they were."""
        resumed = any(self.optimizer.state.values())
        rehearse(
            self.model,
            self.worst,
            lambda batch, trained_tokens: self.training_step(self.model, batch, trained_tokens),
            self.nll,
            device=self.args.device,
            accumulates=self.args.gradient_accumulation_steps > 1,
            missing_state_bytes=0 if resumed else self.optimizer_bytes,
        )
        self.held.release()
        self.step_under_way = OptimizerStep(0)

    # The held-out loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss per trained token of the held-out rows, in nats."""
        rows, size = self.eval_dataset, self.args.eval_batch_size
        metrics = {"eval_loss": mean_nll(rows, self.nll, self.collate, size, self.filler)[0]}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def nll(self, batch: Batch) -> float:
        """Negative log-likelihood of a micro-batch in nats, summed over its trained tokens."""
        compute = partial(batch_nll, self.model)
        return self.step_down.compute(compute, [batch], self.state.global_step + 1, backward=False).item()

    def nll_of_each(self, batches: list[Batch]) -> list[float]:
        """NLL of each micro-batch, in the middle of an optimizer step."""
        losses = [self.nll(batch) for batch in fill_up(batches, self.filler)]
        self.recompute_check.count_again()
        return losses[: len(batches)]

    # Checkpoints. The stock trainer calls these private methods, and has no public ones for what they change.

    def _get_output_dir(self, *_: Any, **__: Any) -> str:
        """The stock trainer writes its checkpoint here, to be renamed when it is whole."""
        return str(staging_folder(Path(self.args.output_dir)))

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        """The stock trainer would leave half a checkpoint where it is killed or the disk is full."""
        write = partial(super()._save_checkpoint, *arguments, **named)
        best = best_step(held_out_losses(self.state.log_history)) if self.keep == "best" else None
        write_checkpoint(Path(self.args.output_dir), self.state.global_step, write, self.run, best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter alone: the stock trainer adds its arguments as a pickle, with the hub token in it."""
        adapter = gather_adapter(self.model)
        if is_main_process():
            save_adapter(self.model, output_dir or self.args.output_dir, adapter)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes none: every checkpoint would hold it."""

    def take_over_finished(self, checkpoint: Path) -> bool:
        """Whether the run ended with the checkpoint, at the last step or out of patience; then loads what it holds.

        The stock trainer would train one step more.
        """
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        state = finished_state(checkpoint, steps, self.patience)
        if state is not None:
            self._load_from_checkpoint(str(checkpoint))
            self.state = state
            print(f"the run had ended, after step {state.global_step}: nothing is trained")
        return state is not None

    def take_adapter_of(self, checkpoint: Path) -> None:
        """Gives the model the adapter of an earlier step, which the checkpoint holds."""
        self._load_from_checkpoint(str(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        set_lr_of_next_step(self.lr_scheduler)

    # Sharded layers. The stock trainer knows only those that accelerate sharded.

    def _move_model_to_device(self, model: PeftModel, device: torch.device) -> None:
        if not self.is_sharded:  # shards are where they belong, some of them in host memory
            super()._move_model_to_device(model, device)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_sharded and not is_main_process():
            self.optimizer.state_dict()  # takes part in gathering the states, which the main process writes
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_sharded:
            load_adapter_shards(self.model, Path(resume_from_checkpoint) / ADAPTER_WEIGHTS)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _RehearseFirst(TrainerCallback):
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.rehearse()
