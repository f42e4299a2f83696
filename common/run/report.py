"""report.html: a run on one page that needs nothing else, for a browser, a phone, or an e-mail."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from common.machine.disk import WRITING_SUFFIX, write_aside
from common.machine.slow_work import format_duration
from common.machine.write_errors import writing
from common.recipe import PREFERENCE_DEFAULTS, PreferenceSpec, UserError
from common.run.charts import Curve, line_chart
from common.run.drift import Drift
from common.run.folder import EVAL_JSON, REPORT, RUN_JSON
from common.run.held_out_loss import lowest_held_out_loss, perplexity
from common.run.metrics_file import curve_of, read_metrics
from common.run.pages import read_object, render
from common.run.preference_advice import collapse_line, first_sign_of_collapse
from common.run.preference_metrics import ACCURACY, HELD_OUT, MARGIN, NLLS, REWARDS

_HELD_OUT = {"accuracy": ACCURACY, "margin": MARGIN, "chosen": REWARDS[1], "rejected": REWARDS[-1]}


def write_report(folder: Path, *, under_way: bool = False) -> Path:
    """Writes report.html from run.json, metrics.jsonl and, where there is one, eval.json. Returns its path.

    Of a run that has not ended: from metrics.jsonl alone. under_way: it goes on in another process; a run.json is of
    an earlier part of it. Raises UserError when the folder holds no run, or files of another version, and when
    report.html cannot be written.
    """
    entries = read_metrics(folder)
    if under_way or not (folder / RUN_JSON).exists():
        if not any("loss" in entry for entry in entries):
            where = "the run there has taken no step yet" if under_way else "there is no run there, or it took no step"
            raise UserError(f"{folder} has nothing to show: {where}")
        page = render("unfinished.html.jinja", run_so_far(entries, folder.name, under_way=under_way))
    else:
        page = _page_of_ended_run(folder, entries)
    own = folder / f"{REPORT}.{os.getpid()}{WRITING_SUFFIX}"  # the run itself writes its report at its end
    with writing(folder / REPORT), write_aside(folder / REPORT, aside=own) as aside:
        aside.write_text(page, encoding="utf-8")
    return folder / REPORT


def _page_of_ended_run(folder: Path, entries: list[dict[str, Any]]) -> str:
    run, evaluation = read_object(folder / RUN_JSON), {}
    if (folder / EVAL_JSON).exists():
        evaluation = read_object(folder / EVAL_JSON)
    try:
        return render("report.html.jinja", page_values(run, entries, evaluation, folder.name))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'run.json'} is of another version, or damaged: {error!r}") from error


def page_values(
    run: dict[str, Any], entries: list[dict[str, Any]], evaluation: dict[str, Any], name: str
) -> dict[str, Any]:
    """The values that the template shows. name: of the run's folder."""
    metrics = run["metrics"]
    kept_step = metrics.get("kept_step", metrics["steps"])  # which runs of earlier versions do not have
    before, after = metrics["eval_loss_before"], metrics["eval_loss"]
    preference = run["recipe"].get("preference")  # which runs of earlier versions do not have
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
        "is_nll": preference is None,
        "preference": preference and _preference_values(preference, metrics, entries),
        "samples": evaluation.get("samples") or run.get("samples", []),
        "evaluation": evaluation,
        "lowest": lowest_held_out_loss(entries, kept_step),
        "kept": f"{kept_step:,} of {metrics['steps']:,}",
        "drift": drift and Drift(**drift),
        "skipped": [entry["step"] for entry in entries if "skipped" in entry],
        **_charts(entries, kept_step),
        "lora": ", ".join(run["recipe"]["lora"]["target_modules"]),
    }


def _preference_values(
    preference: dict[str, Any], metrics: dict[str, Any], entries: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the page of a run with preferences shows beside its charts."""
    spec = PreferenceSpec(**preference)
    values = ", ".join(f"{name} {spec.value(name):g}" for name in PREFERENCE_DEFAULTS[spec.loss])
    held_out = metrics.get("held_out_preferences", {})
    found = {name: [held_out.get(when, {}).get(key) for when in ("before", "after")] for name, key in _HELD_OUT.items()}
    sign = first_sign_of_collapse(entries)
    return {
        "loss": spec.loss,
        "in_words": values,
        "unit": "rated answer" if spec.kind == "rated" else "pair",
        "collapse": sign and collapse_line(*sign, spec),
        "held_out": {name: pair for name, pair in found.items() if None not in pair},
    }


def run_so_far(entries: list[dict[str, Any]], name: str, *, under_way: bool) -> dict[str, Any]:
    """The values that the template of a run that has not ended shows. entries: one has a loss at least."""
    steps = [entry for entry in entries if "loss" in entry]
    return {
        "name": name,
        "under_way": under_way,
        "is_nll": not any(ACCURACY in entry for entry in steps),
        "first": steps[0],
        "last": steps[-1],
        "time": format_duration(steps[-1]["seconds"]),
        "read_at": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        "held_out": [entry["eval_loss"] for entry in entries if "eval_loss" in entry],
        "skipped": [entry["step"] for entry in entries if "skipped" in entry],
        **_charts(entries, kept_step=None),
    }


def _chart_of(title: str, entries: list[dict[str, Any]], curves: dict[str, tuple[str, str]]) -> str:
    """curves: the key in metrics.jsonl and the style of each, by its name. Those of held-out rows are dots."""
    made = [
        Curve(name, curve_of(entries, key), style, dots=key.startswith(HELD_OUT))
        for name, (key, style) in curves.items()
    ]
    return line_chart(f"{title} over the optimizer steps", "optimizer step", made, from_zero=False)


def _preference_charts(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Empty texts for a run without preferences."""
    chosen, rejected = ("chosen", 1), ("rejected", -1)
    styles = {"chosen": "chosen", "rejected": "rejected"}
    rewards = {name: (REWARDS[sign], styles[name]) for name, sign in (chosen, rejected)}
    likelihoods = {name: (NLLS[sign], styles[name]) for name, sign in (chosen, rejected)}

    def both(key: str) -> dict[str, tuple[str, str]]:
        return {"training": (key, "training"), "held out": (HELD_OUT + key, "held-out")}

    return {
        "rewards": _chart_of("Rewards of both answers", entries, rewards),
        "margins": _chart_of("Margin of the rewards", entries, both(MARGIN)),
        "accuracies": _chart_of("Share of comparisons that come out right", entries, both(ACCURACY)),
        "likelihoods": _chart_of("Negative log-likelihood of both answers", entries, likelihoods),
    }


def _charts(entries: list[dict[str, Any]], kept_step: int | None) -> dict[str, str]:
    """The curves of a run over its optimizer steps. kept_step: is marked on the held-out loss."""
    held_out = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]

    def chart(title: str, key: str, name: str) -> str:
        return line_chart(
            f"{title} optimizer steps", "optimizer step", [Curve(name, curve_of(entries, key), "training")]
        )

    losses = [
        Curve("training", curve_of(entries, "loss"), "training"),
        Curve("held out", held_out, "held-out", dots=True),
        Curve("kept", [(step, loss) for step, loss in held_out if step == kept_step][-1:], "kept"),
    ]
    return {
        "losses": line_chart("Loss over the optimizer steps", "optimizer step", losses, from_zero=False),
        "rates": chart("Learning rate over the", "learning_rate", "learning rate"),
        "norms": chart("Norm of the gradient over the", "grad_norm", "gradient norm"),
        "speeds": chart("Tokens per second so far, over the", "tokens_per_s", "tokens/s"),
        **_preference_charts(entries),
    }
