"""The run: our trainer on our rows, the progress line, and the files that a run leaves behind."""

import dataclasses
import heapq
import json
import pickle
import sys
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig

from common.data.batches import collate
from common.data.chat_format import ChatFormat
from common.data.labels import IGNORED, trained_positions
from common.data.rows import Rows, find_examples
from common.machine.collectives import barrier, run_on_main
from common.machine.device import GIB, this_machine
from common.machine.disk import sha256_of
from common.machine.processes import world_size
from common.model.activation_checkpointing import TRAINER_ARGUMENTS
from common.model.attention import uses_packed_attention
from common.model.lean_layers import is_lean, unsupported_reason
from common.model.lora import trainable_params
from common.model.optimizer import build_optimizer
from common.model.sharding import gather_adapter, is_sharded
from common.plan.plan import Plan
from common.process_state import make_deterministic, set_tensorboard_folder
from common.recipe import Recipe, Stopped, TrainSpec, UserError
from common.run.checkpoints import go_back_to, newest_intact, read_run_identity, remove_unfinished
from common.run.evaluation import held_out_samples, sample_answers
from common.run.folder import ADAPTER_WEIGHTS, CHECKPOINTS, RUN_JSON, TENSORBOARD
from common.run.progress import ProgressReport, draw_loss
from common.run.provenance import code_version, command_line
from common.run.report import write_report
from common.run.resume import LIBRARIES, identity, refuse_another_run
from common.run.stopping import StopSignals
from common.run.trainer import Trainer, save_adapter


def trainer_config(train: TrainSpec, plan: Plan, folder: Path, *, evaluates: bool) -> SFTConfig:
    """The recipe's values in the trainer's words."""
    machine = this_machine()
    return SFTConfig(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=plan.micro_batch_rows,
        per_device_eval_batch_size=plan.micro_batch_rows,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=train.learning_rate,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        lr_scheduler_type=train.lr_schedule if train.lr_schedule != "constant" else "constant_with_warmup",
        warmup_steps=train.warmup_ratio,  # below 1: a share of all steps
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
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=True,
        report_to=train.report_to,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        dataloader_pin_memory=machine.is_gpu,
        ddp_backend="gloo" if world_size() > 1 and not machine.is_gpu else None,
        ddp_find_unused_parameters=False,  # each adapter gets a gradient in each micro-batch
        ddp_broadcast_buffers=False,  # they never change
        **TRAINER_ARGUMENTS,
    )


def build_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, recipe: Recipe, plan: Plan, folder: Path
) -> Trainer:
    if plan.rows_per_step != recipe.train.rows_per_step:
        raise RuntimeError(f"the plan has {plan.rows_per_step} rows per step, the recipe {recipe.train.rows_per_step}")
    if is_lean(model) != (recipe.train.kernels == "lean" and unsupported_reason(model) is None):
        raise RuntimeError(f"the layers are not {recipe.train.kernels}, as planned; a recipe calls fuse_layers")
    if is_sharded(model) != plan.layout.sharded:
        raise RuntimeError(f"the plan says {plan.layout}; a recipe calls shard_layers")
    padding_free = uses_packed_attention(model)
    trainer = Trainer(
        model,
        plan.checkpointing,
        worst_batch(rows, plan, padding_free=padding_free),
        plan.optimizer_bytes,
        run_identity(recipe, rows, plan),
        partial(find_examples, recipe.data, tokenizer, recipe.train.seq_len),
        optimizers=(build_optimizer(model, recipe.train), None),
        args=trainer_config(recipe.train, plan, folder, evaluates=rows.evaluation is not None),
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        processing_class=tokenizer,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id, padding_free=padding_free),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, recipe: Recipe, plan: Plan
) -> dict[str, Any]:
    """Trains, evaluates, and leaves adapter, tokenizer, run.json, metrics.jsonl and loss.png in recipe.out.

    Returns what run.json says under "metrics". Raises UserError when the numbers go wrong or the memory runs out.
    """
    folder = Path(recipe.out)
    ChatFormat(tokenizer).refuse_untrained_tokens(model.get_input_embeddings().weight)
    if recipe.train.deterministic:
        make_deterministic()
    if recipe.train.report_to == "tensorboard":
        set_tensorboard_folder(folder / TENSORBOARD)
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, folder)
    if len(rows.train) < recipe.train.rows_per_step:
        print(
            f"warning: there are {len(rows.train)} packed rows and rows_per_step is {recipe.train.rows_per_step}: an "
            "epoch is a single, smaller step. Lower rows_per_step, or raise epochs"
        )
    report = ProgressReport(folder)
    trainer.add_callback(report)
    checkpoint = _checkpoint_to_resume(folder, trainer.run) if recipe.existing_run == "resume" else None
    try:
        if rows.evaluation is not None and checkpoint is None:
            trainer.evaluate()
        with StopSignals() as stop:
            trainer.add_callback(stop)
            if checkpoint is None or not trainer.take_over_finished(checkpoint):
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if stop.received and trainer.state.global_step < trainer.state.max_steps:
            raise Stopped(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}", stop.received)
        if rows.evaluation is not None and "eval_loss" not in report.history[-1]:
            trainer.evaluate()
    except torch.OutOfMemoryError as error:
        if plan.layout.processes > 1:
            raise UserError(
                f"out of GPU memory at step {trainer.state.global_step + 1}. With several GPUs none can go on with "
                f"less by itself: lower TrainSpec.seq_len, or take a leaner TrainSpec.checkpointing ({trainer.policy})"
            ) from error
        raise UserError(
            f"out of GPU memory at step {trainer.state.global_step + 1}, even {trainer.policy} and micro-batches of a "
            "single row. Lower TrainSpec.seq_len, or free the card (nvidia-smi shows who else uses it)"
        ) from error
    except pickle.UnpicklingError as error:  # torch loads states with weights_only
        raise UserError(
            f"{checkpoint} holds a state that is more than tensors and numbers: no run of ours wrote it, and nothing "
            "of it was executed. Remove that folder, then resume again"
        ) from error
    steps = [entry for entry in report.history if "loss" in entry]
    if not steps:
        raise UserError(f"none of the {trainer.state.global_step} steps gave finite numbers; mend the rows named above")
    held_out = [entry["eval_loss"] for entry in report.history if "eval_loss" in entry]
    metrics = {
        "steps": trainer.state.global_step,
        "seconds": steps[-1]["seconds"],
        "tokens": steps[-1]["tokens"],
        "tokens_per_s": steps[-1]["tokens_per_s"],
        "peak_gib": round(this_machine().peak_bytes() / GIB, 2),
        "predicted_bytes": plan.peak_bytes,
        "allocated_bytes": this_machine().allocated_bytes(),
        "step_downs": trainer.step_downs,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "eval_loss_before": held_out[0] if held_out else None,
        "eval_loss": held_out[-1] if held_out else None,
    }
    print(memory_line(plan, trainer))

    adapter = gather_adapter(model)

    def leave_files() -> None:
        save(model, tokenizer, folder, adapter)
        draw_loss(folder)
        samples = _samples(model, tokenizer, rows, recipe)
        write_run(folder, recipe, plan, rows, model, {"metrics": metrics, "samples": samples})
        print(f"adapter, tokenizer, run.json, metrics.jsonl and loss.png are in {folder}")
        print(f"the run on a page: {write_report(folder)}")

    run_on_main(leave_files)
    return metrics


def _samples(model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, recipe: Recipe) -> list[dict[str, str]]:
    """Answers to held-out prompts without the adapter and with it; none where that runs out of memory."""
    if rows.evaluation is None:
        return []
    if is_sharded(model) and recipe.train.sample_answers:
        print("no sample answers: each of their tokens would gather the layers from all cards; make eval shows some")
        return []
    samples = held_out_samples(rows.evaluation, tokenizer, recipe.train.sample_answers, recipe.train.seed)
    try:
        return sample_answers(model, tokenizer, samples)
    except torch.OutOfMemoryError:
        print("no sample answers: they did not fit the card beside the optimizer; make eval shows some")
        return []


def worst_batch(rows: Rows, plan: Plan, *, padding_free: bool) -> dict[str, Any]:
    """A micro-batch of the longest rows there are, held out or not; every token but an example's first is trained."""
    packed = [part for part in (rows.train, rows.evaluation) if part is not None]
    lengths = ((sum(n), which, row) for which, part in enumerate(packed) for row, n in enumerate(part["seq_lengths"]))
    longest = [packed[which][row] for _, which, row in heapq.nlargest(plan.micro_batch_rows, lengths)]
    batch = collate(longest, pad_token_id=0, padding_free=padding_free)
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORED)
    batch["trained_positions"] = trained_positions(batch["labels"])
    return batch


def memory_line(plan: Plan, trainer: Trainer) -> str:
    """Predicted and measured peak, in words."""
    machine = this_machine()
    measured = machine.allocated_bytes()
    if plan.peak_bytes is None or measured is None:
        return f"peak memory: {machine.peak_bytes() / GIB:.2f} GiB of RAM; a plan predicts that of a GPU only"
    line = (
        f"peak memory: predicted {plan.peak_bytes / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB allocated "
        f"({measured / plan.peak_bytes - 1:+.1%}), {machine.peak_bytes() / GIB:.2f} GiB reserved"
    )
    return line + "".join(f"\n  out of memory in {step}" for step in trainer.step_downs)


def run_identity(recipe: Recipe, rows: Rows, plan: Plan) -> dict[str, Any]:
    """What a checkpoint of this run belongs to."""
    sizes = f"{plan.micro_batch_rows} x {plan.accumulation} rows on {plan.layout.processes} processes"
    return identity(recipe, rows, plan=sizes, machine=str(this_machine()))


def _checkpoint_to_resume(folder: Path, run: dict[str, Any]) -> Path | None:
    """The newest intact checkpoint of this very run; says which. Raises UserError when it belongs to another one."""
    run_on_main(lambda: remove_unfinished(folder / CHECKPOINTS))
    newest = newest_intact(folder / CHECKPOINTS)
    if newest is None:
        print(f"{folder / CHECKPOINTS} holds no checkpoint to go on from: starting from the beginning")
        return None
    refuse_another_run(read_run_identity(newest), run, str(newest))
    barrier()  # each has looked at them
    run_on_main(lambda: go_back_to(newest))
    print(f"going on from {newest}")
    return newest


def save(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, folder: Path, adapter: dict[str, Tensor] | None = None
) -> None:
    """Adapter, tokenizer with template, and a generation config that stops at the turn's end."""
    save_adapter(model, folder, adapter)
    tokenizer.save_pretrained(folder)
    generation = model.generation_config
    known = generation.eos_token_id
    ids = {ChatFormat(tokenizer).end_of_turn_id(), *(known if isinstance(known, list) else [known])} - {None}
    generation.eos_token_id = sorted(ids)
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)


def write_run(folder: Path, recipe: Recipe, plan: Plan, rows: Rows, model: PeftModel, result: dict[str, Any]) -> None:
    """run.json: what ran, on what, with which versions, and how it ended (`result`)."""
    run = {
        "recipe": dataclasses.asdict(recipe),
        "plan": dataclasses.asdict(plan),
        "data": [
            {"source": r.source, "read": r.read, "kept": r.kept, "dropped": r.dropped, "truncated": r.truncated}
            | {"tokens": r.tokens, "trained_tokens": r.trained_tokens, "faults": dict(r.fault_counts)}
            for r in rows.reports
        ],
        "packed_rows": len(rows.train),
        "trainable_params": trainable_params(model),
        "machine": str(this_machine()),
        "compute_dtype": str(this_machine().dtype).removeprefix("torch."),
        "versions": {**code_version(), "python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}},
        "seed": recipe.train.seed,
        "command": command_line(),
        "finished": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "adapter_sha256": sha256_of(folder / ADAPTER_WEIGHTS),
        **result,
    }
    (folder / RUN_JSON).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
