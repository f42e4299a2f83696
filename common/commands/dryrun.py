"""`make dryrun`: a few real steps of a recipe with random weights and the data that ships; nothing is downloaded."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from common import REPOSITORY
from common.commands.finetune import start_run
from common.commands.flags import add_run_flags, apply_run_flags, whole_number
from common.machine.disk import write_aside
from common.recipe import DataSpec, Kind, Recipe

DRY_RUN_DATA = REPOSITORY / "data" / "tiny" / "train.jsonl"
DRY_RUN_PAIRS = REPOSITORY / "data" / "tiny" / "preferences.jsonl"
PAIRS_ON_CPU = 32  # of 70 tokens: more than the run's rows hold. The reference is computed for all that there are.


def add_dryrun_flags(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser)
    parser.add_argument(
        "--layers", type=whole_number(1), metavar="N", help="layers of the model (default: all; 2 without a GPU)"
    )


def run_dryrun(recipe: Recipe, flags: argparse.Namespace) -> int | None:
    return start_run(shrink_to_dry_run(apply_run_flags(recipe, flags), flags.layers), flags)


def shrink_to_dry_run(recipe: Recipe, layers: int | None = None) -> Recipe:
    """The recipe with random weights and the small data set that ships, for four steps, into <out>-dry-run.

    Without a GPU the model keeps `layers` layers (default: 2), and the run has two steps of short rows: it takes
    minutes, and fits in host memory.
    """
    from common.machine.device import this_machine
    from common.machine.processes import world_size

    train = replace(recipe.train, max_steps=4, eval_every=1000, save_every=1000, sample_answers=0)
    train = replace(train, rows_per_step=train.most_rows_per_step)  # "auto" would choose by the data set that ships
    pairs = None
    if not this_machine().is_gpu:
        layers, pairs = layers or 2, PAIRS_ON_CPU
        # Where the recipe's own cards cannot hold the model the layers are sharded: two are too few to stream.
        if world_size() > 1 and recipe.card_gib and train.sharding == "auto":
            from common.plan.card import Card
            from common.plan.plan import fits_whole

            whole = fits_whole(recipe, Card.of_size(recipe.card_gib), world_size())
            train = replace(train, sharding="never" if whole else "always")
        train = replace(train, seq_len=min(train.seq_len, 256), rows_per_step=2, max_steps=2)
        recipe = replace(recipe, card_gib=None)
    return replace(
        recipe,
        model=replace(recipe.model, weights="random", layers=layers, chat_template=None),
        data=DataSpec(str(_data_that_ships(recipe.data.kind, pairs)), eval_rows=8, drift_source=None),
        lora=replace(recipe.lora, start_from=None),  # an adapter of the real weights means nothing on random ones
        train=train,
        out=f"{recipe.out}-dry-run",
        existing_run="overwrite",
    )


def _data_that_ships(kind: Kind, pairs: int | None) -> Path:
    """A file of such rows. pairs: how many of those that ship it has, or rated answers of them; None takes all."""
    if kind == "conversations":
        return DRY_RUN_DATA
    rows = [json.loads(line) for line in DRY_RUN_PAIRS.read_text(encoding="utf-8").splitlines()[:pairs]]
    if kind == "rated":
        rows = [
            {"prompt": row["prompt"], "completion": row[answer], "label": answer == "chosen"}
            for row in rows
            for answer in ("chosen", "rejected")
        ]
    path = Path(".cache") / f"dry_run_{kind}.jsonl"  # in the working directory
    aside = path.with_name(f"{path.name}-{os.getpid()}")  # several processes may write it at once
    with write_aside(path, aside=aside):
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
