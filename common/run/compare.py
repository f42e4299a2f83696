"""Runs side by side: what differs in their recipes, and what came of it, as text and on one page.

Loads no model and no torch. What cannot be compared is said: losses over other held-out rows, speeds of other machines.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from common.machine.disk import write_named_file
from common.machine.slow_work import format_duration
from common.recipe import SPECS, UserError
from common.run.charts import Curve, line_chart
from common.run.folder import EVAL_JSON, HELD_OUT_ROWS, RUN_JSON, refuse_run_under_way
from common.run.metrics_file import curve_of, read_metrics
from common.run.pages import read_object, render
from common.run.preference_metrics import ACCURACY, MARGIN

SPEC_OF_PART = SPECS
# Fields that say where a run is, and not what it is; and one that follows from another.
NO_DIFFERENCE = {"out", "existing_run", "fallback_out", "preference", "data.kind"}
RUN_COLOURS = 8  # of the page's style sheet; further runs have them again, dashed
NO_COMMON_PROMPT = "no prompt was answered by all of them: TrainSpec.seed draws the prompts from the held-out rows"
ComparedRow = tuple[str, list[str]]  # what is compared, and what each run has


@dataclass(frozen=True)
class Run:
    """A run that has ended, as its folder tells of it."""

    name: str  # unique among those that are compared
    folder: Path
    record: dict[str, Any]  # run.json
    entries: list[dict[str, Any]]  # of metrics.jsonl
    evaluation: dict[str, Any]  # eval.json; empty where there is none

    @property
    def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = self.record["metrics"]
        return metrics

    @property
    def drift(self) -> dict[str, Any] | None:
        return self.evaluation.get("drift") or self.record.get("drift")

    @property
    def answers(self) -> dict[str, dict[str, str]]:
        """The sample answers by what was asked: those of make eval, where it asked the same again."""
        samples = [*self.record.get("samples", []), *self.evaluation.get("samples", [])]
        return {sample["asked"]: sample for sample in samples}


@dataclass(frozen=True)
class Comparison:
    """What is shown of runs. notes: what cannot be compared, a sentence each."""

    runs: list[Run]
    differences: list[ComparedRow]
    results: list[ComparedRow]
    notes: list[str]
    answers: list[dict[str, Any]]  # "asked", "wanted", "before" (None where the bases differ), and "after", one a run


def read_run(folder: Path, name: str) -> Run:
    """Raises UserError when no run has ended there, when one is under way, and when its files are damaged."""
    refuse_run_under_way(str(folder))
    if not (folder / RUN_JSON).exists():
        raise UserError(f"{folder} has no run.json: there is no run there, or it has not ended; see RUNS=...")
    evaluation = read_object(folder / EVAL_JSON) if (folder / EVAL_JSON).exists() else {}
    return Run(name, folder, read_object(folder / RUN_JSON), read_metrics(folder), evaluation)


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Raises UserError as read_run, for fewer than two runs, and for one that is named twice."""
    places = [folder.resolve() for folder in folders]
    if len(places) < 2:
        raise UserError(f'RUNS names {len(places)} of the runs; two are compared at least: RUNS="outputs/a outputs/b"')
    if twice := [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"RUNS has one run twice: {' and '.join(twice)}")
    runs = [read_run(folder, name) for folder, name in zip(folders, _short_names(places), strict=True)]
    try:
        return Comparison(runs, recipe_differences(runs), _results(runs), _notes(runs), _same_answers(runs))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"run.json of {', '.join(run.name for run in runs)}: one is of another version, or damaged: {error!r}"
        ) from error


def _short_names(places: list[Path]) -> list[str]:
    """The ends of the paths, as long as they must be to be told apart."""
    longest = max(len(place.parts) for place in places)
    return next(
        names
        for names in ([str(Path(*place.parts[-count:])) for place in places] for count in range(1, longest + 1))
        if len(set(names)) == len(names)
    )


def recipe_differences(runs: list[Run]) -> list[ComparedRow]:
    """The fields in which the recipes differ. A field that an earlier version did not have is what is the default."""
    recipes = [_flat(run.record["recipe"]) for run in runs]
    names = dict.fromkeys(chain.from_iterable(recipes))
    rows = []
    for name in names:
        values = [recipe.get(name, _default(name)) for recipe in recipes]
        if name not in NO_DIFFERENCE and any(value != values[0] for value in values):
            rows.append((name, [_words(value) for value in values]))
    return rows


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    parts = {name: value for name, value in recipe.items() if name in SPEC_OF_PART and value is not None}
    nested = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return {name: value for name, value in recipe.items() if name not in SPEC_OF_PART} | nested


def _default(name: str) -> Any:
    part, _, field = name.rpartition(".")
    if part == "preference":  # of a recipe that has none
        return None
    default = next((f.default for f in fields(SPEC_OF_PART[part]) if f.name == field), None)
    return None if default is MISSING or is_dataclass(default) else json.loads(json.dumps(default))


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(" ".join(map(str, item)) if isinstance(item, list) else str(item) for item in value)
    return str(value)


def _results(runs: list[Run]) -> list[ComparedRow]:
    def row(name: str, values: list[str | None]) -> list[ComparedRow]:
        return [(name, [value or "-" for value in values])] if any(values) else []

    def number(form: str, values: list[Any]) -> list[str | None]:
        return [None if value is None else form.format(value) for value in values]

    metrics = [run.metrics for run in runs]
    drifts = [run.drift or {} for run in runs]
    evaluations = [run.evaluation.get("adapter", {}) for run in runs]
    is_kept = [m.get("kept_step", m["steps"]) for m in metrics]
    on_gpu = [m["allocated_bytes"] for m in metrics]
    return [
        *row("held-out loss before", number("{:.4f}", [m["eval_loss_before"] for m in metrics])),
        *row("held-out loss", number("{:.4f}", [m["eval_loss"] for m in metrics])),
        *row("lowest on the way", number("{:.4f}", [_lowest(run) for run in runs])),
        *row("held-out accuracy", [_before_and_after(m, ACCURACY, "{:.1%}") for m in metrics]),
        *row("held-out margin", [_before_and_after(m, MARGIN, "{:.3f}") for m in metrics]),
        *row("loss by make eval", number("{:.4f}", [e.get("loss") for e in evaluations])),
        *row("training loss, first step", number("{:.4f}", [m["first_loss"] for m in metrics])),
        *row("training loss, last step", number("{:.4f}", [m["last_loss"] for m in metrics])),
        *row("drift: KL, nats a token", number("{:.4f}", [d.get("kl") for d in drifts])),
        *row("drift: loss off the task", [f"{d['base_loss']:.3f} → {d['loss']:.3f}" if d else None for d in drifts]),
        *row("optimizer steps", number("{:,}", [m["steps"] for m in metrics])),
        *(row("kept step", number("{:,}", is_kept)) if is_kept != [m["steps"] for m in metrics] else []),
        *row("tokens", number("{:,}", [m["tokens"] for m in metrics])),
        *row("time", [format_duration(m["seconds"]) for m in metrics]),
        *row("tokens/s", number("{:,.0f}", [m["tokens_per_s"] for m in metrics])),
        *row("peak of the GPU, GiB", number("{:.2f}", [b and b / (1 << 30) for b in on_gpu])),
        *row("peak of RAM, GiB", number("{:.2f}", [None if m["allocated_bytes"] else m["peak_gib"] for m in metrics])),
        *row("trained parameters", number("{:,}", [run.record["trainable_params"] for run in runs])),
    ]


def _before_and_after(metrics: dict[str, Any], name: str, form: str) -> str | None:
    found = metrics.get("held_out_preferences", {})
    values = [found.get(when, {}).get(name) for when in ("before", "after")]
    return None if None in values else " → ".join(map(form.format, values))


def _lowest(run: Run) -> float | None:
    return min((entry["eval_loss"] for entry in run.entries if "eval_loss" in entry), default=None)


def _notes(runs: list[Run]) -> list[str]:
    """What the numbers of these runs do not say of each other."""
    notes, records = [], [run.record for run in runs]
    held_out = [held_out_digest(run.folder) for run in runs]
    if None in held_out:
        without = ", ".join(run.name for run, digest in zip(runs, held_out, strict=True) if digest is None)
        notes.append(f"Held-out losses: {without} held no rows out.")
    if len({*held_out} - {None}) > 1:
        notes.append(
            "Held-out losses are over other rows or other tokens, so they do not compare: data, seed, eval_rows or the "
            "tokenizer differ. make eval DATA=... measures each on the same file."
        )
    objectives = [record["recipe"].get("preference") for record in records]
    if any(objective != objectives[0] for objective in objectives):
        notes.append("Losses are of other objectives (PreferenceSpec), so they do not compare; accuracies do.")
    trained = [[(d["source"], d.get("sha256"), d["tokens"]) for d in record["data"]] for record in records]
    if any(data != trained[0] for data in trained):
        notes.append("Training losses are over other data or tokens: only their shapes compare.")
    evaluated = {(run.evaluation["source"], run.evaluation["trained_tokens"]) for run in runs if run.evaluation}
    if len(evaluated) > 1:
        notes.append("Losses by make eval are of other rows, so they do not compare.")
    drifts = [run.drift for run in runs if run.drift]
    texts = {(drift["source"], drift["texts"], drift["tokens"]) for drift in drifts}
    bases = [json.dumps([(r.get("base") or {}).get("sha256"), _base_of(r)]) for r in records]
    if drifts and (len(texts) > 1 or len(set(bases)) > 1):
        notes.append("Drift does not compare: it is of other texts or another base.")
    if len({record["machine"] for record in records}) > 1:
        each = "; ".join(f"{run.name}: {run.record['machine']}" for run in runs)
        notes.append(f"Speed and memory are of different machines. {each}.")
    versions = [record.get("versions", {}) for record in records]
    other = [name for name in dict.fromkeys(chain.from_iterable(versions)) if len({v.get(name) for v in versions}) > 1]
    if other:
        code = ["the code of the recipes" if name == "recipes" else name for name in other]
        notes.append(f"Versions differ: {', '.join(code)}.")
    return notes


def _base_of(record: dict[str, Any]) -> list[Any]:
    model = record["recipe"]["model"]
    return [model["name"], model.get("bits"), model.get("weights"), model.get("layers")]


def held_out_digest(folder: Path) -> str | None:
    """A hash of the examples that the run held out, however they lie in rows; None where it held none out.

    Raises UserError when the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    path = folder / HELD_OUT_ROWS
    if not path.exists():
        return None
    try:
        table = pyarrow.parquet.read_table(path, columns=["input_ids", "labels", "seq_lengths"]).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    examples = []
    for ids, labels, lengths in zip(table["input_ids"], table["labels"], table["seq_lengths"], strict=True):
        start = 0
        for length in lengths:
            examples.append(repr((ids[start : start + length], labels[start : start + length])))
            start += length
    return hashlib.sha256("\n".join(sorted(examples)).encode()).hexdigest()


def _same_answers(runs: list[Run]) -> list[dict[str, Any]]:
    """The prompts that all runs answered, with the answers."""
    answers = [run.answers for run in runs]
    found = []
    for asked, first in answers[0].items():
        if all(asked in each for each in answers):
            of_base = {_sample_answer(each[asked], "before") for each in answers}
            found.append(
                {
                    "asked": asked,
                    "wanted": first["wanted"],
                    "before": of_base.pop() if len(of_base) == 1 else None,
                    "after": [_sample_answer(each[asked], "after") for each in answers],
                }
            )
    return found


def _sample_answer(sample: dict[str, str], side: str) -> str:
    cut = sample.get(f"{side}_cut")
    return sample[side] + (f" … (cut {cut})" if cut else "")


# As text


def as_text(comparison: Comparison, width: int) -> str:
    """The comparison for a terminal of `width` characters."""
    names = [run.name for run in comparison.runs]
    parts = ["what differs in the recipes"]
    parts.append(_table(comparison.differences, names, width) or "  nothing")
    parts += ["", "what came of it", _table(comparison.results, names, width)]
    parts += [f"  {note}" for note in comparison.notes]
    for answer in comparison.answers:
        told = [("asked", answer["asked"])]
        told += [("base", answer["before"] or "(nothing)")] if answer["before"] is not None else []
        told += [(name, after or "(nothing)") for name, after in zip(names, answer["after"], strict=True)]
        told += [("in the data", answer["wanted"])]
        column = max(len(name) for name, _ in told)
        parts += ["", *(f"  {name:<{column}}  {_indented(text, column + 4)}" for name, text in told)]
    if not comparison.answers:
        parts += ["", NO_COMMON_PROMPT]
    return "\n".join(parts)


def _indented(text: str, column: int) -> str:
    return text.replace("\n", "\n" + " " * column)


def _table(rows: list[ComparedRow], names: list[str], width: int) -> str:
    """Runs as columns; where they do not fit beside each other, further ones below."""
    if not rows:
        return ""
    first = max(len(name) for name, _ in rows)
    columns = [[name, *(values[index] for _, values in rows)] for index, name in enumerate(names)]
    wide = [max(map(len, column)) for column in columns]
    blocks: list[list[int]] = [[]]
    for index in range(len(names)):
        if blocks[-1] and first + 4 + sum(wide[i] + 2 for i in [*blocks[-1], index]) > width:
            blocks.append([])
        blocks[-1].append(index)
    return "\n\n".join(
        "\n".join(
            f"  {name:<{first}}" + "".join(f"  {columns[i][line]:>{wide[i]}}" for i in block)
            for line, name in enumerate(["", *(name for name, _ in rows)])
        )
        for block in blocks
    )


# As a page


def write_page(comparison: Comparison, path: Path) -> None:
    """Raises UserError when it cannot be written."""
    runs = comparison.runs
    values = {
        "runs": [{"name": run.name, "style": _style(index)} for index, run in enumerate(runs)],
        "differences": comparison.differences,
        "results": comparison.results,
        "notes": comparison.notes,
        "answers": comparison.answers,
        "held_out": _chart(runs, "Held-out loss", "eval_loss", dots=True),
        "training": _chart(runs, "Training loss", "loss"),
        "is_nll": not any(run.record["recipe"].get("preference") for run in runs),
        "no_common_prompt": NO_COMMON_PROMPT,
        "commands": [(run.name, run.record.get("command", "")) for run in runs],
    }
    write_named_file(path, render("compare.html.jinja", values))


def _chart(runs: list[Run], title: str, key: str, *, dots: bool = False) -> str:
    """Over the optimizer steps; over the tokens where the steps of the runs are not as large as each other."""
    sizes = {(run.record["recipe"]["train"]["rows_per_step"], run.record["recipe"]["train"]["seq_len"]) for run in runs}
    axis = "optimizer step" if len(sizes) == 1 else "tokens"
    curves = []
    for index, run in enumerate(runs):
        tokens = {0: 0} | {entry["step"]: entry["tokens"] for entry in run.entries if "tokens" in entry}
        points = [(step if len(sizes) == 1 else tokens.get(step), value) for step, value in curve_of(run.entries, key)]
        placed = [(x, y) for x, y in points if x is not None]
        curves.append(Curve(run.name, placed, _style(index), dots=dots))
    return line_chart(f"{title} of each run", axis, curves, from_zero=False)


def _style(index: int) -> str:
    return f"run{index % RUN_COLOURS}" + (" dashed" if index >= RUN_COLOURS else "")
