"""The run: TRL's trainer on our rows, our progress line, and the files that a run leaves behind."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from common.activation_checkpointing import RecomputeWatch, trainer_arguments, watch_recompute
from common.adapters import trainable_params
from common.chat_format import ChatFormat
from common.data import Rows, collate
from common.machine import GIB, this_machine
from common.planner import Plan
from common.recipe import Recipe, TrainSpec, UserError
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

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss per trained token of the held-out rows."""
        self.model.eval()
        nll = tokens = 0.0
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader():
                outputs = self.model(**self._prepare_inputs(batch), use_cache=False, fused_lm_head=True)
                nll -= outputs.log_probs.sum().item()
                tokens += outputs.label_mask.sum().item()
        self.model.train()
        metrics = {"eval_loss": nll / max(tokens, 1)}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone: the stock trainer adds its arguments as a pickle, with the hub token in it."""
        self.model.save_pretrained(output_dir or self.args.output_dir)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: it would be written into every checkpoint."""


class CheckRecompute(TrainerCallback):
    """Verifies in the first step that the layers recompute as the plan says."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.stack = contextlib.ExitStack()
        self.watch: RecomputeWatch | None = None

    def on_train_begin(self, *_: Any, model: PeftModel, **__: Any) -> None:
        self.watch = self.stack.enter_context(watch_recompute(model))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.watch is not None:
            self.stack.close()
            self.watch.verify(self.plan.checkpointing, self.plan.accumulation)
            self.watch = None


class Report(TrainerCallback):
    """One progress line on the terminal (one line each `every` seconds elsewhere), and metrics.jsonl."""

    def __init__(self, folder: Path, every: float = 10.0) -> None:
        self.metrics_file = folder / "metrics.jsonl"
        self.every = every
        self.live = sys.stdout.isatty()
        self.history: list[dict[str, Any]] = []
        self.shown_at = -math.inf
        self.started_at = self.step_started_at = 0.0
        self.first_step = self.tokens_before = 0

    def on_train_begin(self, _args: Any, state: TrainerState, _control: Any, **__: Any) -> None:
        self.started_at = self.step_started_at = time.perf_counter()
        self.first_step, self.tokens_before = state.global_step, state.num_input_tokens_seen

    def on_log(
        self, _args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **__: Any
    ) -> None:
        if "eval_loss" in logs:
            self._write({"step": state.global_step, "eval_loss": logs["eval_loss"]})
            self._line(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}", keep=True)
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self.started_at
        tokens_per_s = (state.num_input_tokens_seen - self.tokens_before) / seconds
        entry = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": logs["learning_rate"],
            "tokens": state.num_input_tokens_seen,
            "tokens_per_s": round(tokens_per_s, 1),
            "peak_gib": round(this_machine().peak_bytes() / GIB, 3),
            "seconds": round(seconds, 3),
        }
        self._write(entry)
        if not math.isfinite(entry["loss"]) or not math.isfinite(entry["grad_norm"]):
            raise UserError(
                f"step {state.global_step}: the loss is {entry['loss']} and the gradient norm {entry['grad_norm']}. "
                "Lower TrainSpec.learning_rate; the last good checkpoint is kept"
            )
        left = seconds / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
        self._line(
            f"step {state.global_step}/{state.max_steps} | loss {entry['loss']:.4f} | "
            f"lr {entry['learning_rate']:.2e} | "
            f"{tokens_per_s:,.0f} tokens/s | peak {entry['peak_gib']:.2f} GiB | {_duration(left)} left",
            keep=state.global_step == state.max_steps,
        )

    def _write(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _line(self, text: str, *, keep: bool) -> None:
        if self.live:
            print(f"\r\033[K{text}", end="\n" if keep else "", flush=True)
        elif keep or time.perf_counter() - self.shown_at >= self.every:
            print(text, flush=True)
            self.shown_at = time.perf_counter()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


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
    trainer = Trainer(
        model,
        args=trainer_config(recipe.train, plan, folder, evaluates=rows.evaluation is not None),
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        processing_class=tokenizer,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(CheckRecompute(plan))
    return trainer


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, recipe: Recipe, plan: Plan
) -> dict[str, Any]:
    """Trains, evaluates, and leaves adapter, tokenizer, run.json, metrics.jsonl and loss.png in recipe.out.

    Returns what run.json says under "metrics". Raises UserError when the numbers go wrong or the memory runs out.
    """
    folder = Path(recipe.out)
    if recipe.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # It costs time, and nothing reads such memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    ChatFormat(tokenizer).refuse_untrained_tokens(model.get_input_embeddings().weight)
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, folder)
    report = Report(folder)
    trainer.add_callback(report)
    checkpoint = _checkpoint_to_resume(folder) if recipe.existing_run == "resume" else None
    eval_before = trainer.evaluate()["eval_loss"] if rows.evaluation is not None and checkpoint is None else None
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory at step {trainer.state.global_step + 1}. Lower TrainSpec.seq_len, or free the card "
            f"(nvidia-smi shows who else uses it); {plan.text}"
        ) from error
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in report.history if "loss" in entry]
    metrics = {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "tokens": trainer.state.num_input_tokens_seen,
        "tokens_per_s": round((trainer.state.num_input_tokens_seen - report.tokens_before) / seconds, 1),
        "peak_gib": round(this_machine().peak_bytes() / GIB, 2),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "eval_loss_before": eval_before,
        "eval_loss": _last_eval(trainer, report) if rows.evaluation is not None else None,
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


def _last_eval(trainer: Trainer, report: Report) -> float:
    last = report.history[-1] if report.history else {}
    if "eval_loss" not in last or last["step"] != trainer.state.global_step:
        last = trainer.evaluate()
    return float(last["eval_loss"])


def save(model: PeftModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Adapter, tokenizer with template, and a generation config that stops at the turn's end."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form
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


def draw_loss(folder: Path) -> None:
    """loss.png: training loss of each step, held-out loss where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    held_out = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", linewidth=1.2, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=4, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token (nats)", title=folder.name, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
