"""run.json: what ran, on what, with which versions, and how it ended."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel

from common.data.report import DataReport
from common.data.rows import Rows
from common.machine.device import GIB, this_machine
from common.machine.disk import sha256_of, write_text_atomically
from common.machine.paths import hide_home
from common.model.base_hash import base_record
from common.model.lora import trainable_params
from common.model.start_adapter import start_record
from common.plan.plan import Plan
from common.recipe import Recipe
from common.run.drift import Drift
from common.run.folder import ADAPTER_WEIGHTS, RUN_JSON
from common.run.provenance import code_version, command_line
from common.run.resume import LIBRARIES


def run_metrics(steps_done: int, history: list[dict[str, Any]], plan: Plan, step_downs: list[str]) -> dict[str, Any]:
    """The numbers of a run that has ended. history: the entries of metrics.jsonl, with a finite loss in one at least.

    Seconds, tokens and tokens per second are those of the last step. Losses are nats per trained token, or with
    preferences means of a comparison.
    """
    steps = [entry for entry in history if "loss" in entry]
    retries, ooms = this_machine().full_times()
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return {
        "steps": steps_done,
        "kept_step": steps_done,  # whose adapter is left; TrainSpec(keep="best") may take an earlier one
        "seconds": steps[-1]["seconds"],
        "tokens": steps[-1]["tokens"],
        "tokens_per_s": steps[-1]["tokens_per_s"],
        "peak_gib": round(this_machine().peak_bytes() / GIB, 2),
        "predicted_bytes": plan.peak_bytes,
        "allocated_bytes": this_machine().allocated_bytes(),
        "alloc_retries": retries,  # torch.cuda.memory_stats
        "alloc_ooms": ooms,
        "step_downs": step_downs,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "eval_loss_before": held_out[0] if held_out else None,
        "eval_loss": held_out[-1] if held_out else None,
    }


def memory_line(metrics: dict[str, Any]) -> str:
    """Predicted and measured peak memory, in words, and each step down."""
    predicted, measured = metrics["predicted_bytes"], metrics["allocated_bytes"]
    peak = this_machine().peak_bytes() / GIB
    if predicted is None or measured is None:
        return f"peak memory: {peak:.2f} GiB of RAM; a plan predicts that of a GPU only"
    line = (
        f"peak memory: predicted {predicted / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB allocated "
        f"({measured / predicted - 1:+.1%}), {peak:.2f} GiB reserved"
    )
    return line + "".join(f"\n  out of memory in {step}" for step in metrics["step_downs"])


def full_line(full_times: Sequence[tuple[int, int]]) -> str | None:
    """That a GPU was full, and what it means; None where none was. full_times: Machine.full_times of each process."""
    retries, ooms = max(full_times)
    if not retries and not ooms:
        return None
    which = f"the fullest of {len(full_times)} GPUs" if len(full_times) > 1 else "the GPU"
    failed = f", and {_times(ooms)} that was not enough (out of memory)" if ooms else ""
    return (
        f"{which} was full {_times(retries)}: torch waited for it, gave back the memory it had cached and asked again"
        f"{failed}. That takes time: end other programs on the card (nvidia-smi), or take a leaner "
        "TrainSpec.checkpointing"
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def write_run_json(
    folder: Path,
    recipe: Recipe,
    plan: Plan,
    rows: Rows,
    model: PeftModel,
    metrics: dict[str, Any],
    samples: list[dict[str, str]],
    drift: Drift | None = None,
) -> None:
    """metrics: of run_metrics. samples: completions of held-out prompts (compare_completions)."""
    base = base_record(model)
    start, lora = start_record(model), recipe.lora
    if lora.start_from is not None:
        lora = dataclasses.replace(lora, start_from=hide_home(lora.start_from))
    run = {
        "recipe": dataclasses.asdict(dataclasses.replace(recipe, lora=lora, out=hide_home(recipe.out))),
        "plan": dataclasses.asdict(plan),
        "data": [_source_record(report) for report in rows.reports],
        "base": None if base is None else dataclasses.asdict(base),
        "start": None if start is None else dataclasses.asdict(start),
        "rope": _rope_record(model, recipe),
        "packed_rows": len(rows.train),
        "trainable_params": trainable_params(model),
        "machine": str(this_machine()),
        "compute_dtype": str(this_machine().dtype).removeprefix("torch."),
        "versions": {**code_version(), "python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}},
        "seed": recipe.train.seed,
        "command": command_line(),
        "finished": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "adapter_sha256": sha256_of(folder / ADAPTER_WEIGHTS),
        "metrics": metrics,
        "samples": samples,
        "drift": None if drift is None else dataclasses.asdict(drift),
    }
    write_text_atomically(folder / RUN_JSON, json.dumps(run, indent=2) + "\n")


def _rope_record(model: PeftModel, recipe: Recipe) -> dict[str, Any] | None:
    """What the recipe's RoPE scaling changed in the base's config, by transformers' names; None where it has none."""
    if recipe.model.rope_scaling is None:
        return None
    return {name: getattr(model.config, name) for name in ("rope_parameters", "max_position_embeddings")}


def _source_record(report: DataReport) -> dict[str, Any]:
    """What was read of a source, with the kinds of faults and without their places."""
    names = ("source", "sha256", "read", "kept", "dropped", "truncated", "copies", "tokens", "trained_tokens")
    record = {name: getattr(report, name) for name in (*names, "mixed", "mixed_share")}
    record |= {"too_long": report.too_long.total, "not_to_learn": report.not_to_learn.total}
    return record | {"faults": dict(report.faults.counts), "unread": dict(report.unread), "notes": dict(report.notes)}
