"""A run from the trainer to the files that it leaves: it prepares, trains, measures and saves."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.chat_format import ChatFormat
from common.data.rows import Rows
from common.machine.collectives import run_on_main
from common.model.sharding import gather_adapter, is_sharded
from common.plan.plan import Plan
from common.process_state import make_deterministic, set_tensorboard_folder
from common.recipe import Recipe, Stopped, TrainSpec, UserError
from common.run.artefacts import save_adapter, save_generation_config, save_tokenizer
from common.run.evaluation import compare_completions
from common.run.final_save import save_without_loss, write_optional
from common.run.folder import CHECKPOINTS, REPORT, TENSORBOARD
from common.run.preflight import SMALL_FILES_BYTES, adapter_bytes, rehearse_save
from common.run.progress import ProgressReport, draw_loss
from common.run.prompts import sample_prompts
from common.run.report import write_report
from common.run.resume import checkpoint_to_resume
from common.run.run_json import memory_line, run_metrics, write_run_json
from common.run.stopping import StopSignals
from common.run.trainer import Trainer
from common.run.trainer_config import build_trainer


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, recipe: Recipe, plan: Plan
) -> dict[str, Any]:
    """Trains, evaluates, and leaves the adapter and the files that tell of the run in recipe.out.

    Returns what run.json says under "metrics". Raises UserError when the numbers go wrong or the memory runs out, and
    Stopped after a signal.
    """
    folder = Path(recipe.out)
    ChatFormat(tokenizer).refuse_untrained_tokens(model.get_input_embeddings().weight)
    run_on_main(lambda: rehearse_save(model, tokenizer, recipe, plan))
    prepare_process(recipe.train, folder)
    trainer, report = build_trainer(model, tokenizer, rows, recipe, plan, folder), ProgressReport(folder)
    trainer.add_callback(report)
    _warn_of_few_rows(rows, recipe.train)
    checkpoint = None
    if recipe.existing_run == "resume":
        checkpoint = checkpoint_to_resume(folder / CHECKPOINTS, trainer.run)
    with _failures_in_words(trainer, plan, checkpoint):
        run_steps(trainer, report, checkpoint, evaluates=rows.evaluation is not None)
    if not any("loss" in entry for entry in report.history):
        raise UserError(f"none of the {trainer.state.global_step} steps gave finite numbers; mend the rows named above")
    metrics = run_metrics(trainer.state.global_step, report.history, plan, trainer.step_down.taken)
    print(memory_line(metrics))
    adapter = gather_adapter(model)
    run_on_main(lambda: leave_files(model, tokenizer, rows, recipe, plan, metrics, report, adapter))
    return metrics


def leave_files(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Rows,
    recipe: Recipe,
    plan: Plan,
    metrics: dict[str, Any],
    report: ProgressReport,
    adapter: dict[str, Tensor] | None,
) -> None:
    """Writes what must not be lost, then each optional file by itself: a failure of one is a warning.

    Raises UserError as save_without_loss.
    """

    def write_essential(folder: Path) -> None:
        save_adapter(model, folder, adapter)
        write_run_json(folder, recipe, plan, rows, model, metrics, samples=[])
        save_tokenizer(tokenizer, folder)

    def add_samples() -> None:
        if samples := sample_completions(model, tokenizer, rows, recipe.train):
            write_run_json(folder, recipe, plan, rows, model, metrics, samples)

    fallback = Path(recipe.fallback_out) if recipe.fallback_out is not None else None
    folder = save_without_loss(write_essential, Path(recipe.out), fallback, adapter_bytes(model) + SMALL_FILES_BYTES)
    saved = ["adapter", "tokenizer", "run.json"]
    write_optional("generation_config.json", lambda: save_generation_config(model, tokenizer, folder))
    saved += write_optional("metrics.jsonl", lambda: report.metrics.write_whole(folder))
    saved += write_optional("loss.png", lambda: draw_loss(folder))
    write_optional("sample answers", add_samples)
    is_on_a_page = write_optional("report.html", lambda: write_report(folder))
    print(f"{', '.join(saved[:-1])} and {saved[-1]} are in {folder}")
    if is_on_a_page:
        print(f"the run on a page: {folder / REPORT}")


def prepare_process(train: TrainSpec, folder: Path) -> None:
    """Sets what a run needs for the whole process: determinism, and the folder of tensorboard's files."""
    if train.deterministic:
        make_deterministic()
    if train.report_to == "tensorboard":
        set_tensorboard_folder(folder / TENSORBOARD)


def _warn_of_few_rows(rows: Rows, train: TrainSpec) -> None:
    if len(rows.train) < train.rows_per_step:
        print(
            f"warning: there are {len(rows.train)} packed rows and rows_per_step is {train.rows_per_step}: an "
            "epoch is a single, smaller step. Lower rows_per_step, or raise epochs"
        )


def run_steps(trainer: Trainer, report: ProgressReport, checkpoint: Path | None, *, evaluates: bool) -> None:
    """Takes the optimizer steps, from the first or from a checkpoint, with the held-out loss before and after them.

    Raises Stopped when a signal ended them early, with a checkpoint.
    """
    if evaluates and checkpoint is None:
        trainer.evaluate()
    with StopSignals() as stop, report.without_silence():
        trainer.add_callback(stop)
        if checkpoint is None or not trainer.take_over_finished(checkpoint):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if stop.received and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}", stop.received)
    if evaluates and "eval_loss" not in report.history[-1]:
        trainer.evaluate()


@contextmanager
def _failures_in_words(trainer: Trainer, plan: Plan, checkpoint: Path | None) -> Iterator[None]:
    """Raises UserError for what the user can mend: out of memory, and a checkpoint that holds code."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        step = trainer.state.global_step + 1
        if plan.layout.processes > 1:
            raise UserError(
                f"out of GPU memory at step {step}. With several GPUs none can go on with "
                f"less by itself: lower TrainSpec.seq_len, or take a leaner TrainSpec.checkpointing ({trainer.policy})"
            ) from error
        raise UserError(
            f"out of GPU memory at step {step}, even {trainer.policy} and micro-batches of a "
            "single row. Lower TrainSpec.seq_len, or free the card (nvidia-smi shows who else uses it)"
        ) from error
    except pickle.UnpicklingError as error:  # torch loads states with weights_only
        raise UserError(
            f"{checkpoint} holds a state that is more than tensors and numbers: no run of ours wrote it, and nothing "
            "of it was executed. Remove that folder, then resume again"
        ) from error


def sample_completions(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, train: TrainSpec
) -> list[dict[str, str]]:
    """Completions of held-out prompts without the adapter and with it; none where that runs out of memory."""
    if rows.evaluation is None:
        return []
    if is_sharded(model) and train.sample_answers:
        print("no sample answers: each of their tokens would gather the layers from all cards; make eval shows some")
        return []
    prompts = sample_prompts(rows.evaluation, tokenizer, train.sample_answers, train.seed)
    try:
        return compare_completions(model, tokenizer, prompts)
    except torch.OutOfMemoryError:
        print("no sample answers: they did not fit the card beside the optimizer; make eval shows some")
        return []
