"""The run: TRL's trainer on our rows, our progress line, and the files that a run leaves behind."""

import contextlib
import dataclasses
import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from common.activation_checkpointing import RecomputeWatch, trainer_arguments, watch_recompute
from common.adapters import trainable_params
from common.attention import PACKED
from common.chat_format import ChatFormat
from common.data import Rows
from common.machine import GIB, this_machine
from common.packing import collate
from common.planner import Plan
from common.progress import Report, draw_loss
from common.recipe import Checkpointing, Recipe, TrainSpec, UserError
from common.run_folder import CHECKPOINTS

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate")


class Trainer(SFTTrainer):
    """TRL's trainer with fp32 adapters, a held-out loss weighted by tokens, and no pickled settings on disk."""

    def __init__(self, model: PeftModel, **arguments: Any) -> None:
        adapters = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, **arguments)
        # TRL casts the adapters of a 4-bit model to bf16, where small updates round away and a resumed run differs.
        for name, parameter in model.named_parameters():
            if name in adapters:
                parameter.data = adapters[name]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        """The model's own fused loss (common.loss): TRL's goes through the head a third time, for its metrics."""
        return super(SFTTrainer, self).compute_loss(model, inputs, *arguments, **named)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss per trained token of the held-out rows."""
        self.model.eval()
        nll = tokens = 0.0
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader():
                nll += self.model(**self._prepare_inputs(batch), num_items_in_batch=1).loss.item()
                tokens += len(batch["trained_positions"])
        self.model.train()
        metrics = {"eval_loss": nll / max(tokens, 1)}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone: the stock trainer adds its arguments as a pickle, with the hub token in it."""
        save_adapter(self.model, output_dir or self.args.output_dir)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: it would be written into every checkpoint."""


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """adapter_model.safetensors and adapter_config.json; without PEFT's look at the hub for a grown vocabulary."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's form, to be filled in


class CheckRecompute(TrainerCallback):
    """Verifies in the first step that the layers recompute as the plan says."""

    def __init__(self, policy: Checkpointing) -> None:
        self.policy = policy
        self.stack = contextlib.ExitStack()
        self.watch: RecomputeWatch | None = None

    def on_train_begin(self, *_: Any, model: PeftModel, **__: Any) -> None:
        self.watch = self.stack.enter_context(watch_recompute(model))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.watch is not None:
            self.stack.close()
            self.watch.verify(self.policy)
            self.watch = None


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
        lr_scheduler_type=train.schedule if train.schedule != "constant" else "constant_with_warmup",
        warmup_steps=train.warmup_share,  # below 1: a share of all steps
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer,
        bf16=machine.dtype == torch.bfloat16,
        fp16=machine.dtype == torch.float16,
        use_cpu=not machine.is_gpu,
        seed=train.seed,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=train.eval_every,
        save_strategy="steps",
        save_steps=train.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would print 0.0 for NaN
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        dataloader_pin_memory=machine.is_gpu,
        **trainer_arguments(plan.checkpointing),
    )


def build_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, recipe: Recipe, plan: Plan, folder: Path
) -> Trainer:
    if plan.rows_per_step != recipe.train.rows_per_step:
        raise RuntimeError(f"the plan has {plan.rows_per_step} rows per step, the recipe {recipe.train.rows_per_step}")
    flat = model.config._attn_implementation == PACKED
    trainer = Trainer(
        model,
        args=trainer_config(recipe.train, plan, folder, evaluates=rows.evaluation is not None),
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        processing_class=tokenizer,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id, flat=flat),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(CheckRecompute(plan.checkpointing))
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
        torch.use_deterministic_algorithms(True, warn_only=True)
        # It costs time, and nothing reads such memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, folder)
    if len(rows.train) < recipe.train.rows_per_step:
        print(
            f"warning: there are {len(rows.train)} packed rows and rows_per_step is {recipe.train.rows_per_step}: an "
            "epoch is a single, smaller step. Lower rows_per_step, or raise epochs"
        )
    report = Report(folder)
    trainer.add_callback(report)
    checkpoint = _checkpoint_to_resume(folder) if recipe.existing_run == "resume" else None
    try:
        if rows.evaluation is not None and checkpoint is None:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=checkpoint)
        if rows.evaluation is not None and "eval_loss" not in report.history[-1]:
            trainer.evaluate()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory at step {trainer.state.global_step + 1}. Lower TrainSpec.seq_len, or free the card "
            f"(nvidia-smi shows who else uses it). {plan.text.splitlines()[0]}"
        ) from error
    steps = [entry for entry in report.history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in report.history if "eval_loss" in entry]
    metrics = {
        "steps": trainer.state.global_step,
        "seconds": steps[-1]["seconds"],
        "tokens": steps[-1]["tokens"],
        "tokens_per_s": steps[-1]["tokens_per_s"],
        "peak_gib": round(this_machine().peak_bytes() / GIB, 2),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "eval_loss_before": held_out[0] if held_out else None,
        "eval_loss": held_out[-1] if held_out else None,
    }
    save(model, tokenizer, folder)
    draw_loss(folder)
    write_run(folder, recipe, plan, rows, model, metrics)
    print(f"adapter, tokenizer, run.json, metrics.jsonl and loss.png are in {folder}")
    return metrics


def _checkpoint_to_resume(folder: Path) -> str | None:
    checkpoints = folder / CHECKPOINTS
    newest = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    print(
        f"going on from {newest}" if newest else f"{checkpoints} holds no checkpoint yet: starting from the beginning"
    )
    return newest


def save(model: PeftModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Adapter, tokenizer with template, and a generation config that stops at the turn's end."""
    save_adapter(model, folder)
    tokenizer.save_pretrained(folder)
    generation = model.generation_config
    known = generation.eos_token_id
    ids = {ChatFormat(tokenizer).end_of_turn_id(), *(known if isinstance(known, list) else [known])} - {None}
    generation.eos_token_id = sorted(ids)
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)


def write_run(folder: Path, recipe: Recipe, plan: Plan, rows: Rows, model: PeftModel, metrics: dict[str, Any]) -> None:
    """run.json: what ran, on what, with which versions, and how it ended."""
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
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}},
        "seed": recipe.train.seed,
        "metrics": metrics,
    }
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
