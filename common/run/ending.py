"""What a run does after its last step: it saves what was learnt, and leaves the files that tell of it."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.rows import Rows
from common.machine.out_of_memory import out_of_memory
from common.machine.paths import output_path
from common.model.lora import unmoved_adapters
from common.model.sharding import is_sharded
from common.model.start_adapter import StartedFrom
from common.plan.plan import Plan
from common.recipe import Recipe, TrainSpec, UserError
from common.run.artefacts import save_adapter, save_generation_config, save_tokenizer
from common.run.asking import ask_as_trained
from common.run.drift import Drift
from common.run.evaluation import SAMPLE_SECONDS, compare_completions
from common.run.final_save import save_without_loss, write_optional
from common.run.folder import REPORT
from common.run.loss_picture import draw_loss
from common.run.metrics_file import MetricsFile
from common.run.model_card import write_model_card
from common.run.preflight import SMALL_FILES_BYTES, adapter_bytes
from common.run.prompts import sample_prompts
from common.run.report import write_report
from common.run.run_json import write_run_json


def refuse_unmoved(adapter: dict[str, Tensor], steps: int, start: StartedFrom | None = None) -> None:
    """Raises UserError when no step has moved the adapter, and warns of parts of it that none has moved.

    adapter: its tensors by name. start: where it started, if not anew.
    """
    unmoved, count = unmoved_adapters(adapter, start), sum("lora_B" in name for name in adapter)
    if len(unmoved) == count:
        raise UserError(
            f"{steps} {'step' if steps == 1 else 'steps'} taught nothing: the adapter is what it was before the first. "
            "Its updates are too small for fp32, or were skipped. Raise TrainSpec.learning_rate, or train more steps"
        )
    if unmoved:
        print(f"warning: {len(unmoved)} of {count} linear layers learnt nothing, first {unmoved[0]}")


def leave_files(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Rows,
    recipe: Recipe,
    plan: Plan,
    metrics: dict[str, Any],
    metrics_file: MetricsFile,
    adapter: dict[str, Tensor],
    drift: Drift | None = None,
) -> None:
    """Writes what must not be lost, then each optional file by itself: a failure of one is a warning.

    Raises UserError as save_without_loss.
    """

    def write_essential(folder: Path) -> None:
        save_adapter(model, folder, adapter)
        write_run_json(folder, recipe, plan, rows, model, metrics, samples=[], drift=drift)
        save_tokenizer(saved_tokenizer, folder)

    def add_samples() -> None:
        if samples := sample_completions(model, tokenizer, rows, recipe.train):
            write_run_json(folder, recipe, plan, rows, model, metrics, samples, drift)

    saved_tokenizer = ask_as_trained(tokenizer, rows.reports)
    fallback = output_path(recipe.fallback_out) if recipe.fallback_out is not None else None
    folder = save_without_loss(write_essential, Path(recipe.out), fallback, adapter_bytes(model) + SMALL_FILES_BYTES)
    saved = ["adapter", "tokenizer", "run.json"]
    write_optional("generation_config.json", lambda: save_generation_config(model, tokenizer, folder))
    saved += write_optional("metrics.jsonl", lambda: metrics_file.write_whole(folder))
    saved += write_optional("loss.png", lambda: draw_loss(folder, metrics["kept_step"]))
    write_optional("sample answers", add_samples)
    saved += write_optional("README.md", lambda: write_model_card(folder))
    is_on_a_page = write_optional("report.html", lambda: write_report(folder))
    print(f"{', '.join(saved[:-1])} and {saved[-1]} are in {folder}")
    if is_on_a_page:
        print(f"the run on a page: {folder / REPORT}")


def sample_completions(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, train: TrainSpec
) -> list[dict[str, str]]:
    """Completions of held-out prompts without the adapter and with it; none where that runs out of memory.

    A slow device gives fewer or shorter ones: each side has SAMPLE_SECONDS.
    """
    if rows.evaluation is None:
        return []
    if is_sharded(model) and train.sample_answers:
        print("no sample answers: each of their tokens would gather the layers from all cards; make eval shows some")
        return []
    prompts = sample_prompts(rows.evaluation, tokenizer, train.sample_answers, train.seed)
    try:
        return compare_completions(model, tokenizer, prompts, SAMPLE_SECONDS)
    except Exception as error:
        if out_of_memory(error) is None:
            raise
        print("no sample answers: they did not fit the card beside the optimizer; make eval shows some")
        return []
