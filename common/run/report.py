"""report.html: a run on one page that needs nothing else, for a browser, a phone, or an e-mail."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.machine.device import GIB
from common.machine.disk import write_text_atomically
from common.machine.slow_work import format_duration
from common.machine.write_errors import writing
from common.recipe import UserError
from common.run.charts import Curve, line_chart
from common.run.drift import Drift
from common.run.folder import EVAL_JSON, REPORT, RUN_JSON
from common.run.held_out_loss import lowest_held_out_loss, perplexity
from common.run.metrics_file import read_metrics

TEMPLATE = Path(__file__).parent / "report.html.jinja"


def write_report(folder: Path) -> Path:
    """Writes report.html from run.json, metrics.jsonl and, where there is one, eval.json. Returns its path.

    Raises UserError when the folder holds no run that has ended, or files of another version, and when report.html
    cannot be written.
    """
    if not (folder / RUN_JSON).exists():
        raise UserError(f"{folder} has no run.json: there is no run there, or it has not ended")
    run, evaluation = read_json(folder / RUN_JSON), {}
    if (folder / EVAL_JSON).exists():
        evaluation = read_json(folder / EVAL_JSON)
    environment = Environment(  # autoescape: an answer may hold HTML
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": lambda n: f"{n:,}", "gib": lambda n: f"{n / GIB:.2f}"}
    try:
        page = environment.get_template(TEMPLATE.name).render(
            page_values(run, read_metrics(folder), evaluation, folder.name)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'run.json'} is of another version, or damaged: {error!r}") from error
    with writing(folder / REPORT):
        write_text_atomically(folder / REPORT, page)
    return folder / REPORT


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of the run holds. Raises UserError when it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return values


def page_values(
    run: dict[str, Any], entries: list[dict[str, Any]], evaluation: dict[str, Any], name: str
) -> dict[str, Any]:
    """The values that the template shows. name: of the run's folder."""
    metrics, steps = run["metrics"], [entry for entry in entries if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]

    def curve(key: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[key]) for entry in steps]

    kept_step = metrics.get("kept_step", metrics["steps"])  # which runs of earlier versions do not have
    kept = [(step, loss) for step, loss in held_out if step == kept_step][-1:]
    before, after = metrics["eval_loss_before"], metrics["eval_loss"]
    drift = evaluation.get("drift") or run.get("drift")
    return {
        "name": name,
        "run": run,
        "recipe": run["recipe"],
        "metrics": metrics,
        "time": format_duration(metrics["seconds"]),
        "before": before,
        "after": after,
        "perplexities": None if after is None else [f"{perplexity(loss):,.2f}" for loss in (before, after)],
        "samples": evaluation.get("samples") or run.get("samples", []),
        "evaluation": evaluation,
        "lowest": lowest_held_out_loss(entries, kept_step),
        "kept": f"{kept_step:,} of {metrics['steps']:,}",
        "drift": drift and Drift(**drift),
        "skipped": [entry["step"] for entry in entries if "skipped" in entry],
        "losses": line_chart(
            "Loss over the optimizer steps",
            "optimizer step",
            [
                Curve("training", curve("loss"), "training"),
                Curve("held out", held_out, "held-out", dots=True),
                Curve("kept", kept, "kept"),
            ],
            from_zero=False,
        ),
        "rates": line_chart(
            "Learning rate over the optimizer steps",
            "optimizer step",
            [Curve("learning rate", curve("learning_rate"), "training")],
        ),
        "speeds": line_chart(
            "Tokens per second so far, over the optimizer steps",
            "optimizer step",
            [Curve("tokens/s", curve("tokens_per_s"), "training")],
        ),
        "lora": ", ".join(run["recipe"]["lora"]["target_modules"]),
    }
