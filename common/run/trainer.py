"""TRL's trainer, made for a night on one card: it tries the worst moment first, and steps down instead of dying."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer as TransformersTrainer
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from common.data.batches import Batch, halve, split_into_examples
from common.machine.collectives import all_reduce_max, all_reduce_sum, run_on_main
from common.machine.processes import is_main_process, rank, world_size
from common.model.activation_checkpointing import (
    TRAINER_FLAG,
    Policy,
    RecomputeWatch,
    checkpoint_activations,
    watch_recompute,
)
from common.model.sharding import (
    clip_grad_norm,
    gather_adapter,
    gather_states_when_saved,
    is_sharded,
    load_adapter_shards,
)
from common.recipe import UserError
from common.run.checkpoints import (
    CHECKPOINT_PREFIX,
    commit_checkpoint,
    keep_newest,
    list_checkpoints,
    remove_unfinished,
    staging_folder,
)
from common.run.folder import ADAPTER_WEIGHTS, SAVING

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch's and safetensors' own for a failed write
MAX_SKIPPED_STEPS = 3  # optimizer steps in a row without finite numbers
MAX_SKIPPED_STEPS_FP16 = 20  # the same with fp16's scaler, which tries ever smaller scales
MAX_NAMED_ROWS = 5


class Trainer(SFTTrainer):
    """fp32 adapters, our fused loss, a held-out loss weighted by tokens, no pickled settings on disk.

    Out of memory, it keeps the activations of fewer layers, then cuts its micro-batches in half, and begins the
    optimizer step again: what an interrupted backward pass has added to the gradients cannot be told from the rest.
    Rows per optimizer step stay what they are, and no step is lost.
    """

    def __init__(
        self,
        model: PeftModel,
        policy: Policy,
        worst: Batch,
        optimizer_bytes: int = 0,
        run: dict[str, Any] | None = None,
        find_places: Callable[[list[list[int]]], list[str]] = lambda examples: [],
        **arguments: Any,
    ) -> None:
        """worst: a micro-batch of the longest rows, every token trained. optimizer_bytes: of the optimizer's states.
        run: what a checkpoint says it belongs to. find_places: where in the data examples with these ids are."""
        adapters = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        self.is_sharded = is_sharded(model)
        refuse_two_checkpointings(self.is_sharded, arguments["args"])
        super().__init__(model, **arguments)
        # TRL casts the adapters of a 4-bit model to bf16, where small updates round away and a resumed run differs.
        for name, parameter in model.named_parameters():
            if name in adapters:
                parameter.data = adapters[name]
        self.policy, self.worst, self.optimizer_bytes, self.run = policy, worst, optimizer_bytes, run or {}
        self.halvings = 0  # how often each micro-batch is cut in half
        self.step_downs: list[str] = []
        self.micro_batches: list[Batch] = []  # of the optimizer step under way
        self.step_under_way = -1
        self.find_places = find_places
        self.losses: list[Tensor] = []  # of those micro-batches
        self.skipped_in_a_row, self.skipped_step = 0, -1
        self.stock_clip = self.accelerator.clip_grad_norm_
        if self.is_sharded:
            self.stock_clip = self._clip_shards
            gather_states_when_saved(self.optimizer)
            self.stock_prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = self._prepare_shards
        self.accelerator.clip_grad_norm_ = self._clip_finite
        self.first_step = FirstStep(self)
        self.add_callback(self.first_step)

    def training_step(self, model: PeftModel, inputs: Batch, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Forward and backward of one micro-batch; its loss, divided by the tokens of the whole optimizer step."""
        if self.step_under_way != self.state.global_step:
            self.step_under_way, self.micro_batches, self.losses = self.state.global_step, [], []
        self.micro_batches.append(inputs)

        def run_all(batches: list[Batch]) -> Tensor:
            for batch in batches:
                losses = [
                    super(Trainer, self).training_step(model, part, num_items_in_batch) for part in self.cut(batch)
                ]
            return torch.stack(losses).sum()

        first, again = [inputs], self.micro_batches
        loss = self._stepping_down(lambda: run_all(first), lambda: run_all(again), keep_less=True)
        self.losses.append(loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)  # the stock trainer's running sum would never be a number again

    def _prepare_shards(self, model: PeftModel, *_: Any, **__: Any) -> PeftModel:
        """With autocast; "for evaluation" is without DistributedDataParallel around it."""
        prepared: PeftModel = self.stock_prepare(model, device_placement=False, evaluation_mode=True)
        return prepared

    def _move_model_to_device(self, model: PeftModel, device: torch.device) -> None:
        if not self.is_sharded:  # whose parts are where they belong, some of them in host memory
            super()._move_model_to_device(model, device)

    def _clip_shards(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Tensor:
        self.accelerator.unscale_gradients()
        return clip_grad_norm(parameters, max_norm)

    def _clip_finite(self, *arguments: Any, **named: Any) -> Tensor:
        """The gradients' norm before they are clipped; where it or a loss is not finite, there is no step to take."""
        norm: Tensor = self.stock_clip(*arguments, **named)
        finite = torch.stack([loss.detach() for loss in self.losses]).isfinite()
        if not all_reduce_max(not bool(finite.all() & norm.isfinite())):  # all take the step, or none
            self.skipped_in_a_row = 0
        else:
            self._skip_step(norm, finite)
        return norm.nan_to_num(0.0, 0.0, 0.0)

    def _skip_step(self, norm: Tensor, finite: Tensor) -> None:
        """Leaves the adapter as it is, and names the rows. Raises UserError when that does not help."""
        scaler, self.skipped_in_a_row = self.accelerator.scaler, self.skipped_in_a_row + 1
        limit = MAX_SKIPPED_STEPS if scaler is None else MAX_SKIPPED_STEPS_FP16
        if scaler is not None and finite.all() and self.skipped_in_a_row < limit:
            return  # fp16's scaler skips the step itself, and tries a smaller scale: it begins with too large a one
        step, what = self.state.global_step + 1, f"the gradient norm is {norm.item()}"
        if not finite.all():
            what = f"the loss is {torch.stack(self.losses)[~finite][0].item()}"
        advice = "Lower TrainSpec.learning_rate; the last good checkpoint is kept"
        if not all(parameter.isfinite().all() for parameter in self.model.parameters() if parameter.requires_grad):
            raise UserError(f"step {step}: {what}, and the adapter itself is no longer finite. {advice}")
        if scaler is None:
            self.model.zero_grad()
        self.skipped_step = step
        suspects = [batch for batch, good in zip(self.micro_batches, finite.tolist(), strict=True) if not good]
        examples = [example for batch in suspects or self.micro_batches for example in self._not_finite(batch)]
        self.first_step.begin_again()  # looking for them ran the layers too
        places = self.find_places(examples[:MAX_NAMED_ROWS])
        rows = f" ({'; '.join(places)}{' and more' if len(examples) > len(places) else ''})" if places else ""
        print(f"\nwarning: step {step}: {what}{rows}; the step is skipped", flush=True)
        if self.skipped_in_a_row >= limit:
            raise UserError(
                f"{limit} steps in a row gave no finite numbers, the last one {step}: {what}{rows}. {advice}"
            )

    def _not_finite(self, batch: Batch) -> list[list[int]]:
        """Token ids of the examples whose own loss is not finite; of all where only their gradients are not."""
        examples = split_into_examples(batch)
        losses = [self.nll(example) for example in self._together(examples)]
        bad = [example for example, loss in zip(examples, losses, strict=False) if not math.isfinite(loss)]
        return [example["input_ids"][0].tolist() for example in bad or examples]

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """As ever; of a step that was skipped, that it was."""
        skipped = "loss" in logs and self.skipped_step == self.state.global_step
        super().log({"skipped": 1.0} if skipped else logs, *rest)

    def _stepping_down(self, run: Callable[[], Tensor], retry: Callable[[], Tensor], *, keep_less: bool) -> Tensor:
        """What `run` returns; out of memory, what `retry` does with less. Raises OutOfMemoryError at the end of it."""
        while True:
            try:
                return run()
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # its frames hold the tensors of the step that failed
            less = self._less(keep_less)
            if less is None or self.accelerator.num_processes > 1:  # other processes would wait for this one
                raise failure
            self.step_downs.append(f"step {self.state.global_step + 1}: {less}")
            print(
                f"out of memory in step {self.state.global_step + 1}; going on with {less}; rows per step stay the same"
            )
            self.model.zero_grad()
            self.first_step.begin_again()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            run = retry

    def _less(self, keep_less: bool) -> str | None:
        """Changes what takes less memory, and says what: fewer layers kept, else half the micro-batch, else offload."""
        if keep_less and self.policy.kept:
            self.policy = replace(self.policy, kept=self.policy.kept // 2)
        elif any(len(halve(part)) == 2 for part in self.cut(self.micro_batches[-1])):
            self.halvings += 1
            return f"each micro-batch in {2**self.halvings} parts"
        elif keep_less and not self.policy.offload:
            self.policy = replace(self.policy, offload=True)
        else:
            return None
        checkpoint_activations(self.model, self.policy)
        return str(self.policy)

    def cut(self, batch: Batch) -> list[Batch]:
        parts = [batch]
        for _ in range(self.halvings):
            parts = [half for part in parts for half in halve(part)]
        return parts

    def compute_loss(self, model: Any, inputs: Batch, *arguments: Any, **named: Any) -> Any:
        """The model's own fused loss (common.model.loss): TRL's goes through the head a third time, for its metrics."""
        return TransformersTrainer.compute_loss(self, model, inputs, *arguments, **named)

    def rehearse(self) -> None:
        """Goes through the worst moment before the first step: gradients and optimizer states there, every row full.

        A run that cannot finish ends here, in its first seconds, or begins with what it can. Weights, gradients and
        random numbers are left as they were.
        """
        device = self.args.device
        trained = torch.tensor(len(self.worst["trained_positions"]), device=device)
        there = any(self.optimizer.state.values())  # in a resumed run
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            states = torch.empty(0 if there else self.optimizer_bytes, dtype=torch.uint8, device=device)
            for _ in range(2 if self.args.gradient_accumulation_steps > 1 else 1):
                self.training_step(self.model, self.worst, trained)
            self.nll(self.worst)
            del states
        self.model.zero_grad()
        self.step_under_way = -1

    @torch.no_grad()
    def nll(self, batch: Batch) -> float:
        """Negative log-likelihood of a micro-batch in nats, summed over its trained tokens."""
        self.model.eval()

        def run() -> Tensor:
            with self.accelerator.autocast():
                losses = [
                    self.model(**self._prepare_inputs(part), num_items_in_batch=1).loss for part in self.cut(batch)
                ]
            return torch.stack(losses).sum()

        self.micro_batches = [batch]
        total = self._stepping_down(run, run, keep_less=False).item()
        self.model.train()
        return total

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss per trained token of the held-out rows."""
        nll = tokens = 0.0
        own = list(self.own_part_of_evaluation())
        for number, batch in enumerate(self._together(own)):
            loss = self.nll(batch)
            if number < len(own):
                nll += loss
                tokens += len(batch["trained_positions"])
        nll, tokens = all_reduce_sum([nll, tokens])
        metrics = {"eval_loss": nll / max(tokens, 1)}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def own_part_of_evaluation(self) -> Iterator[Batch]:
        """This process's share of the held-out rows, each row in exactly one: the stock loader fills shares up."""
        size = self.args.eval_batch_size
        rows = range(rank(), len(self.eval_dataset), world_size())
        for start in range(0, len(rows), size):
            yield self.data_collator([self.eval_dataset[row] for row in rows[start : start + size]])

    def _together(self, batches: list[Batch]) -> Iterator[Batch]:
        """The batches, and the longest row again until every process has gone through as many: sharded layers are
        gathered from all."""
        missing = all_reduce_max(len(batches)) - len(batches) if self.is_sharded else 0
        yield from batches
        for _ in range(missing):
            yield self.worst

    def _get_output_dir(self, *_: Any, **__: Any) -> str:
        """Where the stock trainer writes a checkpoint: beside its place."""
        return str(staging_folder(Path(self.args.output_dir)))

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        """The stock trainer's checkpoint, whole or not there (common.run.checkpoints); the newest ones stay.

        Where it cannot be written, for a full disk, the run says so and goes on: it still has the one before.
        """
        folder, name, failure = Path(self.args.output_dir), f"{CHECKPOINT_PREFIX}{self.state.global_step}", ""
        run_on_main(lambda: remove_unfinished(folder))
        try:
            super()._save_checkpoint(*arguments, **named)  # each process its random numbers, the first all else
        except WRITE_ERRORS as error:
            failure = str(error).splitlines()[0]
        if not all_reduce_max(bool(failure)) and is_main_process():
            try:
                commit_checkpoint(staging_folder(folder) / name, folder / name, self.run)
                keep_newest(folder)
            except WRITE_ERRORS as error:
                failure = str(error).splitlines()[0]
        if all_reduce_max(bool(failure)):
            kept = next((path.name for path in list_checkpoints(folder)), "none yet")
            reason = failure or "another process says why"
            print(f"warning: {name} cannot be written ({reason}); training goes on, the last checkpoint is {kept}")
        run_on_main(lambda: remove_unfinished(folder))

    def take_over_finished(self, checkpoint: Path) -> bool:
        """Whether the checkpoint is that of the last step; then its adapter is loaded, and nothing is left to train.

        The stock trainer would train one step more.
        """
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        total = self.args.max_steps if self.args.max_steps > 0 else state.max_steps
        if state.global_step < total or state.num_train_epochs < self.args.num_train_epochs:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone: the stock trainer adds its arguments as a pickle, with the hub token in it."""
        adapter = gather_adapter(self.model)
        if is_main_process():
            save_adapter(self.model, output_dir or self.args.output_dir, adapter)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_sharded and not is_main_process():
            self.optimizer.state_dict()  # which the first process writes, and each has a part of
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter_shards(self.model, Path(resume_from_checkpoint) / ADAPTER_WEIGHTS)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: it would be written into every checkpoint."""


class FirstStep(TrainerCallback):
    """Rehearses the worst moment, then verifies in the first step that the layers recompute as the policy says."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.stack = contextlib.ExitStack()
        self.watch: RecomputeWatch | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.rehearse()
        self.watch = self.stack.enter_context(watch_recompute(self.trainer.model))

    def begin_again(self) -> None:
        """Forgets what ran before a step down."""
        if self.watch is not None:
            self.stack.close()
            self.watch = self.stack.enter_context(watch_recompute(self.trainer.model))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.watch is not None and self.watch.micro_batches:
            self.stack.close()
            self.watch.verify(self.trainer.policy)
            self.watch = None


def refuse_two_checkpointings(sharded: bool, arguments: Any) -> None:
    """Raises UserError where the trainer, or accelerate, would do again what the recipe does on sharded layers.

    With the trainer's flag beside FSDP's own checkpointing each layer is gathered once more (transformers issue 30404).
    """
    flag = TRAINER_FLAG
    if sharded and getattr(arguments, flag):
        raise UserError(
            f"{flag}=True in the trainer's arguments, and the plan checkpoints sharded layers already: each would be "
            "gathered once more. Leave the trainer's off; TrainSpec.checkpointing says which layers recompute"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise UserError(
            "accelerate is told to shard the model (ACCELERATE_USE_FSDP), which the recipe's plan does where it is "
            "needed: start it with torchrun, or with accelerate launch without --use_fsdp"
        )


def save_adapter(model: PeftModel, folder: str | Path, adapter: dict[str, Tensor] | None = None) -> None:
    """adapter_model.safetensors and adapter_config.json, each whole or not there; without PEFT's look at the hub for a
    grown vocabulary, and its README, a form to be filled in. adapter: of cut layers, its tensors (whole_adapter)."""
    folder = Path(folder)
    aside = folder / SAVING
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(str(aside), state_dict=adapter, save_embedding_layers=False)
    for name in (ADAPTER_WEIGHTS, "adapter_config.json"):
        (aside / name).replace(folder / name)
    shutil.rmtree(aside)
