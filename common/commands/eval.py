"""`make eval`: base against adapter on held-out rows."""

import argparse
from dataclasses import replace
from pathlib import Path

from common.commands.flags import whole_number
from common.machine.paths import local_path
from common.recipe import Recipe, UserError
from common.run.folder import EVAL_JSON, refuse_inside


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="rows of this file or hub data set instead of the run's held-out rows")
    parser.add_argument(
        "--samples", type=whole_number(0), default=5, metavar="N", help="answers side by side (default: 5)"
    )
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="where to write it (default: eval.json of the run)"
    )


def run_eval(recipe: Recipe, flags: argparse.Namespace) -> None:
    """Prints and writes the losses and sample answers of base and adapter.

    Raises UserError when the run held no rows out and --data names none.
    """
    if flags.json and flags.json != Path(recipe.out) / EVAL_JSON:
        refuse_inside(flags.json, recipe.out, "JSON")
    print(f"reading the adapter in {recipe.out}", flush=True)
    from common.adapter.find import find_adapter
    from common.adapter.load import load_trained, trained_tokenizer
    from common.data.rows import load_rows
    from common.run.evaluation import compare_with_base, print_evaluation, write_evaluation
    from common.run.prompts import sample_prompts
    from common.run.report import write_report

    adapter = find_adapter(recipe)
    tokenizer = trained_tokenizer(adapter)
    data, train = adapter.recipe.data, adapter.recipe.train
    if flags.data:
        data = replace(data, eval_source=flags.data, eval_split=data.split, revision=None)
    if data.eval_source:  # all its rows; the training data need not be read
        rows = replace(data, source=data.eval_source, split=data.eval_split, eval_source=None, eval_rows=0)
        held_out = load_rows(rows, tokenizer, train.seq_len).train
    else:
        held_out = load_rows(data, tokenizer, train.seq_len, train.seed).evaluation
    if held_out is None:
        raise UserError("the run held no rows out; name a file or a hub data set: DATA=held_out.jsonl")
    prompts = sample_prompts(held_out, tokenizer, flags.samples, train.seed)
    model = load_trained(adapter)
    print(f"with the adapter and without: the loss of {len(held_out):,} rows, {len(prompts)} answers", flush=True)
    result = {
        "source": data.eval_source or f"held out of {data.source}",
        **compare_with_base(model, tokenizer, held_out, prompts),
    }
    print_evaluation(result)
    path = flags.json or adapter.folder / EVAL_JSON
    write_evaluation(result, path)
    print(f"written to {path}")
    if not flags.json and not flags.data and adapter.run:
        print(f"and into {write_report(adapter.folder)}")
