"""A run from the trainer to the files that it leaves: it prepares, trains, measures and saves."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from common.data.rows import Rows
from common.data.steps import settle_rows_per_step, step_lines
from common.machine.collectives import all_gather, broadcast_from_main, run_on_main
from common.machine.device import this_machine
from common.machine.layout import RING_SLOTS, Layout
from common.machine.out_of_memory import out_of_memory
from common.machine.processes import is_main_process
from common.model.activation_checkpointing import checkpoint_activations, decoder_layers
from common.model.host_embedding import use_host_embedding
from common.model.lean_layers import is_lean, use_lean_layers
from common.model.pad_embedding import mend_pad_embedding
from common.model.sharding import gather_adapter, shard_layers, without_fsdp_classes
from common.model.start_adapter import started_from
from common.model.weight_streaming import leave_ring_to_processes, stream_weights
from common.plan.machine_plan import plan_for_examples
from common.plan.plan import Plan
from common.process_state import make_deterministic
from common.recipe import Kernels, Recipe, Stopped, TrainSpec, UserError, require
from common.run.best import Losses, checkpoint_to_keep, held_out_losses, kept_line, refuse_without_held_out
from common.run.capacity import warn_of_capacity
from common.run.checkpoints import step_of_checkpoint
from common.run.drift import measure_drift
from common.run.ending import leave_files, refuse_unmoved
from common.run.folder import CHECKPOINTS
from common.run.general_texts import load_general_texts
from common.run.held_out_loss import lowest_held_out_loss
from common.run.held_out_rows import save_held_out_rows
from common.run.preference_advice import warn_of_learning_rate
from common.run.preference_metrics import held_out_results
from common.run.preflight import rehearse_save
from common.run.progress import ProgressReport
from common.run.reference import with_reference
from common.run.resume import checkpoint_to_resume, rows_per_step_before
from common.run.run_json import full_line, memory_line, run_metrics
from common.run.stopping import StopSignals
from common.run.trackers import GuardedTracker, keep_tracker_files
from common.run.trainer import Trainer
from common.run.trainer_config import build_trainer
from common.tokens.chat_format import ChatFormat


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, recipe: Recipe, plan: Plan
) -> dict[str, Any]:
    """Trains, evaluates, and leaves the adapter and the files that tell of the run in recipe.out.

    Returns what run.json says under "metrics". Raises UserError when the numbers go wrong or the memory runs out, and
    where no folder is named, and Stopped after a signal.
    """
    require(
        bool(recipe.out),
        "the run has no folder: write @story above the recipe's main (from common.run import story), which gives it "
        "one when Python calls it, or name one: Recipe(out='outputs/mine')",
    )
    folder, written = Path(recipe.out), recipe
    begun_with = rows_per_step_before(folder / CHECKPOINTS) if recipe.existing_run == "resume" else None
    recipe, plan = settle_steps(recipe, plan, rows, begun_with)
    plan = plan_for_examples(recipe, before := plan, rows.most_examples)
    if plan.checkpointing != before.checkpointing:
        checkpoint_activations(model, plan.checkpointing)
    refuse_without_held_out(recipe.train, rows)
    make_layers_ready(model, recipe.train.kernels, plan.layout)
    mend_pad_embedding(model, tokenizer)
    ChatFormat(tokenizer).refuse_untrained_tokens(model.get_input_embeddings().weight)
    run_on_main(lambda: rehearse_save(model, tokenizer, recipe, plan))
    source = recipe.data.drift_source
    general = None if source is None else load_general_texts(source, tokenizer, recipe.train.seq_len)
    prepare_process(recipe.train, folder)
    rows = with_reference(model, tokenizer, rows, recipe, plan)
    trainer, report = build_trainer(model, tokenizer, rows, recipe, plan, folder), ProgressReport(folder)
    trainer.add_callback(report)
    if recipe.train.report_to != "none" and is_main_process():
        trainer.add_callback(GuardedTracker(recipe.train.report_to))
    print("\n".join(step_lines(len(rows.train), written.train, plan.layout.processes, begun_with)))
    if warning := warn_of_capacity(rows, recipe) if recipe.preference is None else warn_of_learning_rate(recipe):
        print(warning)
    checkpoint = None
    if recipe.existing_run == "resume":
        keeps_best = recipe.train.keep == "best"
        checkpoint = checkpoint_to_resume(folder / CHECKPOINTS, trainer.run, keeps_best=keeps_best)
    if (held_out := rows.evaluation) is not None:
        run_on_main(lambda: save_held_out_rows(held_out, folder))
    with _failures_in_words(trainer, plan, checkpoint):
        run_steps(trainer, report, checkpoint, evaluates=rows.evaluation is not None)
    if not any("loss" in entry for entry in report.history):
        raise UserError(f"none of the {trainer.state.global_step} steps gave finite numbers; mend the rows named above")
    metrics = run_metrics(trainer.state.global_step, report.history, plan, trainer.step_down.taken)
    if written.train.rows_per_step == "auto":  # run.json has the recipe as it was settled
        metrics["recipe_as_written"] = {"rows_per_step": "auto", "learning_rate": written.train.learning_rate}
    print(memory_line(metrics))
    if line := full_line(all_gather(this_machine().full_times())):
        print(line)
    losses = held_out_losses([*report.history, *trainer.state.log_history])
    metrics |= take_best(trainer, losses) if recipe.train.keep == "best" else {}
    if preferences := held_out_results(report.history, metrics["kept_step"]):
        metrics["held_out_preferences"] = preferences
    if line := lowest_held_out_loss(report.history, metrics.get("kept_step")):
        print(line)
    drift = None if general is None else measure_drift(model, general, tokenizer, plan.micro_batch_rows)
    if drift is not None:
        print("\n".join(drift.lines()))
    adapter = gather_adapter(model)
    refuse_unmoved(adapter, trainer.state.global_step, started_from(model))
    with StopSignals("stopping when the files of the run are written") as stop:
        run_on_main(lambda: leave_files(model, tokenizer, rows, recipe, plan, metrics, report.metrics, adapter, drift))
        stop.raise_if_received(f"stopped after the last step; the run is whole, in {folder}")
    return metrics


def make_layers_ready(model: PeftModel, kernels: Kernels, layout: Layout) -> None:
    """Makes the decoder layers what the plan was counted for: lean, and sharded where it says so.

    What is so already stays: a recipe may have called use_lean_layers or shard_layers, or asked for answers. Lean comes
    first where it can, because fully_shard gives a layer another class. All processes must call it.
    """
    if not is_lean(model):
        with without_fsdp_classes(model):
            use_lean_layers(model, kernels)
    shard_layers(model, layout)
    stream_weights(model, layout.streamed)
    if layout.embedding_on_host:
        use_host_embedding(model)
    leave_ring_to_processes(model)


def settle_steps(recipe: Recipe, plan: Plan, rows: Rows, begun_with: int | None = None) -> tuple[Recipe, Plan]:
    """Recipe and plan with a number where rows_per_step is "auto", which the data decides: settle_rows_per_step."""
    train = settle_rows_per_step(recipe.train, len(rows.train), plan.layout.processes, begun_with)
    if train is recipe.train:
        return recipe, plan
    return replace(recipe, train=train), plan.with_rows_per_step(train.most_rows_per_step)


def take_best(trainer: Trainer, losses: Losses) -> dict[str, Any]:
    """Gives the model the adapter with the lowest held-out loss. Returns which step's it is, for run.json."""
    last = trainer.state.global_step
    best = broadcast_from_main(checkpoint_to_keep(Path(trainer.args.output_dir), losses, last))
    kept = last if best is None else step_of_checkpoint(best)
    if best is not None:
        trainer.take_adapter_of(best)
    print(kept_line(losses, kept))
    return {"kept_step": kept, "eval_loss": losses[kept], "last_eval_loss": losses[last]}


def prepare_process(train: TrainSpec, folder: Path) -> None:
    """Sets what a run needs for the whole process: determinism, and the folder of a tracker's files."""
    if train.deterministic:
        make_deterministic()
    keep_tracker_files(train.report_to, folder)


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
    except pickle.UnpicklingError as error:  # torch loads states with weights_only
        raise UserError(
            f"{checkpoint} holds a state that is more than tensors and numbers: no run of ours wrote it, and nothing "
            "of it was executed. Remove that folder, then resume again"
        ) from error
    except Exception as error:
        if (memory := out_of_memory(error)) is None:
            raise
        where = f"out of {memory} memory at step {trainer.state.global_step + 1}"
        if memory == "host":
            raise UserError(
                f"{where} ({trainer.policy}). Close other programs (free -h shows what is left of it), or lower "
                "TrainSpec.seq_len"
            ) from error
        if plan.layout.processes > 1:
            layers = len(decoder_layers(trainer.model))
            stream = f', or let all weights wait in host memory: SET="train.weights_on_host={layers}"'
            raise UserError(
                f"{where}. With several GPUs none can go on with "
                f"less by itself: lower TrainSpec.seq_len, or take a leaner TrainSpec.checkpointing ({trainer.policy})"
                f"{stream * (RING_SLOTS < layers != plan.layout.streamed)}"
            ) from error
        raise UserError(
            f"{where}, even {trainer.policy} and micro-batches of a "
            "single row. Lower TrainSpec.seq_len, or free the card (nvidia-smi shows who else uses it)"
        ) from error
