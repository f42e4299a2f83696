"""`make plan`: prints and draws how a run would use a card, before anything is downloaded."""

import argparse
from dataclasses import replace
from pathlib import Path

from common.commands.flags import add_run_flags, apply_run_flags
from common.machine.paths import local_path
from common.recipe import Recipe
from common.run.folder import refuse_inside


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser)
    parser.set_defaults(plans_for_kinds=True)  # --gpu may be the name of one: choose_gpu
    parser.add_argument("--card-gib", type=float, metavar="GIB", help="plan for a card of this size")
    parser.add_argument("--seq-len", type=int, metavar="N", help="plan for rows of N tokens")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="write the plan there, for machines")


def run_plan(recipe: Recipe, flags: argparse.Namespace) -> None:
    """Prints and draws the plan for the kind of GPU that --gpu names, else for --card-gib, else for this machine's
    GPUs, else for the recipe's card_gib.

    Raises UserError when no plan fits the card, and as named_gpu.
    """
    from common.machine.device import first_gpus, this_machine
    from common.plan.card import Card, smallest_of
    from common.plan.machine_plan import describe_kind, plan_for_card, setting_of, setting_of_kind
    from common.plan.picture import draw_plan
    from common.plan.plan import choose_option
    from common.plan.report import build_report
    from common.plan.report_json import write_json
    from common.plan.speed import named_gpu, speed_of

    if flags.json:
        refuse_inside(flags.json, recipe.out, "JSON")
    recipe = apply_run_flags(recipe, flags)
    if flags.seq_len is not None:
        recipe = replace(recipe, train=replace(recipe.train, seq_len=flags.seq_len))
    if flags.card_gib is not None:
        recipe = replace(recipe, card_gib=flags.card_gib)
    kind, machine = named_gpu(flags.gpu), this_machine()
    if kind is not None:
        print(describe_kind(kind, recipe.model))
        card, setting = Card.of_kind(kind, flags.card_gib), setting_of_kind(kind, recipe.model)
    elif flags.card_gib is None and machine.is_gpu:
        here = flags.gpus or 1
        card = smallest_of([(Card.of_machine(gpu), gpu.dtype) for gpu in first_gpus(here)])
        if card.host_bytes is not None:
            card = replace(card, host_bytes=card.host_bytes // here)  # the run's processes share it
        setting = setting_of(machine, recipe.model)
    elif recipe.card_gib is not None:
        card, setting = Card.of_size(recipe.card_gib), setting_of_kind(speed_of(None), recipe.model)
    else:
        plan_for_card(recipe)
        print("  a CPU's memory is not planned; for a GPU: make plan CARD_GIB=24")
        return
    card = replace(card, cards=flags.gpus or 1)
    report = build_report(*choose_option(recipe, card, setting, (flags.gpus or 1) * flags.nnodes))
    print(report.text())
    picture = flags.json.with_suffix(".png") if flags.json else Path("outputs") / f"plan-{flags.recipe_name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_plan(report, picture)
    if flags.json:
        write_json(report, flags.json)
    print(f"drawn in {picture}" + (f", written in {flags.json}" if flags.json else ""))
