"""The recipe and the plan in the trainer's words."""

from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig

from common.data.batches import collate
from common.data.rows import Rows, find_examples
from common.machine.device import this_machine
from common.machine.processes import world_size
from common.model.activation_checkpointing import TRAINER_FLAG
from common.model.attention import uses_packed_attention
from common.model.base_hash import base_record
from common.model.lean_layers import is_lean, unsupported_reason
from common.model.optimizer import build_optimizer
from common.model.sharding import is_sharded
from common.model.start_adapter import start_record
from common.plan.plan import Plan
from common.recipe import Recipe, TrainSpec, UserError
from common.run.folder import CHECKPOINTS
from common.run.preference_trainer import PreferenceTrainer
from common.run.rehearsal import worst_batch
from common.run.resume import run_identity
from common.run.trainer import Trainer


def build_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, recipe: Recipe, plan: Plan, folder: Path
) -> Trainer:
    """The trainer of a run that writes into `folder`.

    Raises UserError where the recipe's story made something else of the model than was planned.
    """
    refuse_unplanned(model, recipe, plan)
    padding_free, base = uses_packed_attention(model), base_record(model)
    kind = Trainer if recipe.preference is None else partial(PreferenceTrainer, preference=recipe.preference)
    trainer: Trainer = kind(
        model,
        plan.checkpointing,
        worst_batch(rows, plan.micro_batch_rows, padding_free=padding_free),
        plan.optimizer_bytes,
        run_identity(recipe, rows, plan, base.sha256 if base else None, start_record(model)),
        partial(find_examples, recipe.data, tokenizer, recipe.train.seq_len),
        recipe.train.keep,
        recipe.train.patience,
        optimizers=(build_optimizer(model, recipe.train), None),
        args=trainer_config(recipe.train, plan, folder, evaluates=rows.evaluation is not None),
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        processing_class=tokenizer,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id, padding_free=padding_free),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def refuse_unplanned(model: PeftModel, recipe: Recipe, plan: Plan) -> None:
    """Raises UserError where the model is not what the plan is about, and RuntimeError where the recipe is not."""
    if plan.rows_per_step != recipe.train.rows_per_step:  # numbers both, by settle_steps
        raise RuntimeError(f"the plan has {plan.rows_per_step} rows per step, the recipe {recipe.train.rows_per_step}")
    if is_lean(model) != (recipe.train.kernels == "lean" and unsupported_reason(model) is None):
        raise UserError(
            f"the layers are not {recipe.train.kernels}, as TrainSpec.kernels says: remove the call of use_lean_layers "
            "from the recipe, train makes them so"
        )
    if is_sharded(model) != plan.layout.sharded:
        raise UserError(
            f"the plan says {plan.layout}, and the layers lie otherwise: remove the call of shard_layers from the "
            "recipe, train shards them"
        )


def trainer_config(train: TrainSpec, plan: Plan, folder: Path, *, evaluates: bool) -> SFTConfig:
    """The recipe's values as arguments of TRL's trainer."""
    machine = this_machine()
    config = SFTConfig(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=plan.micro_batch_rows,
        per_device_eval_batch_size=plan.micro_batch_rows,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=train.learning_rate,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        lr_scheduler_type=train.lr_schedule,  # both are read by Trainer.create_scheduler
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=machine.dtype == torch.bfloat16,
        fp16=machine.dtype == torch.float16,
        use_cpu=not machine.is_gpu,
        seed=train.seed,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=train.eval_every,
        save_strategy="steps",
        save_steps=train.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would print 0.0 for NaN
        include_num_input_tokens_seen="non_padding",  # Trainer counts them in its own way
        disable_tqdm=True,
        report_to="none",  # trackers.py attaches the one of the recipe
        run_name=folder.absolute().name,  # there
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        dataloader_pin_memory=machine.is_gpu,
        accelerator_config={"non_blocking": machine.is_gpu},  # else each copy of a batch waits for the GPU
        ddp_backend="gloo" if world_size() > 1 and not machine.is_gpu else None,
        ddp_find_unused_parameters=False,  # each adapter gets a gradient in each micro-batch
        ddp_broadcast_buffers=False,  # they never change
        **{TRAINER_FLAG: False},  # the plan decides which layers recompute
    )
    # Commands hide all GPUs but one (machine/gpus.py). In a process of another kind that sees several, which is no
    # command of ours, the trainer would use all of them in DataParallel, and TRL refuses that.
    config._n_gpu = min(config.n_gpu, 1)
    return config
