"""`make data`: what a run would say about its data, and examples with the trained part marked. Loads no model."""

import argparse
import json
import sys
from dataclasses import replace

from common.commands.flags import replace_data, whole_number
from common.machine.disk import write_named_file
from common.machine.paths import local_path
from common.recipe import Recipe
from common.run.folder import refuse_inside


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="look at this file or hub data set instead of the recipe's")
    parser.add_argument("--seq-len", type=int, metavar="N", help="in rows of N tokens")
    parser.add_argument(
        "--examples", type=whole_number(0), default=3, metavar="N", help="so many are shown (default: 3)"
    )
    parser.add_argument("--json", type=local_path, metavar="FILE", help="write all of it there, for machines")


def run_data(recipe: Recipe, flags: argparse.Namespace) -> None:
    """Prints what load_rows prints, examples, lengths and steps; writes them to --json.

    Raises UserError where the run would refuse the data, after all that could be found out is printed and written.
    """
    if flags.json:
        refuse_inside(flags.json, recipe.out, "JSON")
    if flags.data:
        recipe = replace_data(recipe, flags.data)
    if flags.seq_len is not None:
        recipe = replace(recipe, train=replace(recipe.train, seq_len=flags.seq_len))
    print(f"reading {recipe.data.name} as {recipe.model.name} would be trained on it", flush=True)
    from common.data.look import look_at
    from common.data.overview import Lengths, Packing, example_lines, overview_values
    from common.data.steps import settle_rows_per_step, step_lines
    from common.model.config import refuse_more_positions
    from common.model.loading import load_tokenizer
    from common.run.capacity import warn_of_capacity

    refuse_more_positions(recipe)
    tokenizer = load_tokenizer(recipe.model)
    look = look_at(recipe.data, tokenizer, recipe.train.seq_len, recipe.train.seed, flags.examples)
    print("\n".join(["", *example_lines(look.examples, tokenizer, recipe.data.kind, on_terminal=sys.stdout.isatty())]))
    if look.rows is not None:
        steps = step_lines(len(look.rows.train), recipe.train)
        packing = Packing.of_rows(look.rows, recipe.train)
        print("\n".join([*Lengths.of_rows(look.rows).lines(), steps[0], *packing.lines(), *steps[1:]]))
        settled = replace(recipe, train=settle_rows_per_step(recipe.train, len(look.rows.train)))
        if warning := warn_of_capacity(look.rows, settled):
            print(warning)
    if flags.json:
        values = overview_values(recipe, look, tokenizer)
        write_named_file(flags.json, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        print(f"written to {flags.json}")
    if look.refusal is not None:
        raise look.refusal
