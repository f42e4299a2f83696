"""`make eval`: base against adapter on held-out rows."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.commands.flags import add_gpu_flag, other_data, whole_number
from common.machine.paths import local_path
from common.recipe import Recipe, UserError
from common.run.folder import EVAL_JSON, refuse_inside

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from common.adapter.find import TrainedAdapter


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    add_gpu_flag(parser)
    parser.add_argument("--data", help="rows of this file or hub data set instead of the run's held-out rows")
    parser.add_argument(
        "--samples", type=whole_number(0), default=5, metavar="N", help="answers side by side (default: 5)"
    )
    parser.add_argument(
        "--answer-seconds",
        type=whole_number(1),
        metavar="N",
        help="time for the answers of each side; a slow device shows fewer or shorter ones (default: 60)",
    )
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="where to write it (default: eval.json of the run)"
    )


def run_eval(recipe: Recipe, flags: argparse.Namespace) -> None:
    """Prints and writes the losses and sample answers of base and adapter.

    Raises UserError when the run kept no held-out rows and --data names none.
    """
    if flags.json and flags.json != Path(recipe.out) / EVAL_JSON:
        refuse_inside(flags.json, recipe.out, "JSON")
    print(f"reading the adapter in {recipe.out}", flush=True)
    from common.adapter.answer_layout import layout_on
    from common.adapter.find import find_adapter
    from common.adapter.load import load_trained, trained_tokenizer
    from common.machine.device import this_machine
    from common.run.evaluation import SAMPLE_SECONDS, compare_with_base, print_evaluation, write_evaluation
    from common.run.general_texts import texts_if_there
    from common.run.prompts import sample_prompts
    from common.run.report import write_report

    adapter = find_adapter(recipe)
    tokenizer = trained_tokenizer(adapter)
    rows, source = rows_to_evaluate(adapter, tokenizer, flags.data)
    prompts = sample_prompts(rows, tokenizer, flags.samples, adapter.recipe.train.seed)
    general = texts_if_there(adapter.recipe.data.drift_source, tokenizer, adapter.recipe.train.seq_len)
    layout = layout_on(adapter.recipe, this_machine(), evaluates_rows=True)
    model = load_trained(adapter, tokenizer, layout)
    print(f"with the adapter and without: the loss of {len(rows):,} rows, {len(prompts)} answers", flush=True)
    max_seconds = flags.answer_seconds or SAMPLE_SECONDS
    preference = adapter.recipe.preference
    if preference is not None and preference.needs_reference and adapter.run.get("start") and flags.data:
        print("rewards are in comparison with the base, and not with the adapter that the run started from")
    result = {"source": source, **compare_with_base(model, tokenizer, rows, prompts, general, max_seconds, preference)}
    print_evaluation(result)
    path = flags.json or adapter.folder / EVAL_JSON
    write_evaluation(result, path)
    print(f"written to {path}")
    if not flags.json and not flags.data and adapter.run:
        print(f"and into {write_report(adapter.folder)}")


def rows_to_evaluate(
    adapter: "TrainedAdapter", tokenizer: "PreTrainedTokenizerFast", data: str | None
) -> tuple["Dataset", str]:
    """Packed rows, and their source in words: all rows of `data` where given, else those that the run held out.

    Of an adapter that was trained elsewhere, whose held-out rows nobody knows: those of the recipe's eval_source.
    """
    from common.data.rows import load_rows
    from common.run.held_out_rows import has_changed, load_held_out_rows

    spec, seq_len = adapter.recipe.data, adapter.recipe.train.seq_len
    if data:
        given = replace(adapter.recipe, data=replace(other_data(spec, data), eval_rows=0))  # which sets data.kind
        return load_rows(given.data, tokenizer, seq_len).train, data
    held_out = load_held_out_rows(adapter.folder)
    if held_out is not None:
        sources = adapter.run.get("data", [])
        if any(has_changed(source) for source in (sources[-1:] if spec.eval_source else sources)):
            print(f"{spec.eval_source or spec.name} has changed since the run: the rows are those that it held out")
        return held_out, spec.eval_source or f"held out of {spec.name}"
    if spec.eval_source and not adapter.run:
        own, split = spec.eval_source, spec.eval_split
        whole = replace(spec, source=own, sources=(), split=split, eval_source=None, eval_rows=0)
        return load_rows(replace(adapter.recipe, data=whole).data, tokenizer, seq_len).train, own
    raise UserError(f"{adapter.folder} has no held-out rows; name a file or a hub data set: DATA=held_out.jsonl")
