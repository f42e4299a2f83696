"""What a user can ask for, one module each. To add a command, touch three places:

1. a module here, with a function that does it, run_..., and one for its flags, if it has any;
2. a line in COMMANDS below;
3. a target in the Makefile: `python -m recipes COMMAND NAME [flags]`.

make compare (compare.py) takes folders of runs in the place of a recipe: recipes/__main__.py calls it.

Modules here import what takes seconds (torch, transformers) inside their functions: a wrong flag is refused at once.
Not here: parsing and the exit status (common.cli), and the work itself (the packages below).
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from common.commands.chat import add_chat_flags, run_chat
from common.commands.data import add_data_flags, run_data
from common.commands.dryrun import add_dryrun_flags, run_dryrun
from common.commands.eval import add_eval_flags, run_eval
from common.commands.export import add_export_flags, run_export
from common.commands.finetune import add_finetune_flags, run_finetune
from common.commands.merge import add_merge_flags, run_merge
from common.commands.plan import add_plan_flags, run_plan
from common.commands.push import add_push_flags, run_push
from common.commands.report import run_report
from common.recipe import Recipe


class Command(NamedTuple):
    """What common.cli calls for a command. The parsed flags also hold `recipe_name` and `story`, the recipe's main."""

    run: Callable[[Recipe, argparse.Namespace], int | None]  # returns an exit status; None stands for 0
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None  # beside --out, which every command has
    reads_run: bool = False  # a run must not write into the folder meanwhile
    computes: bool = True  # on a GPU where there is one; it has --gpu


COMMANDS = {
    "finetune": Command(run_finetune, add_finetune_flags),
    "data": Command(run_data, add_data_flags, computes=False),
    "plan": Command(run_plan, add_plan_flags),
    "dryrun": Command(run_dryrun, add_dryrun_flags),
    "chat": Command(run_chat, add_chat_flags),
    "eval": Command(run_eval, add_eval_flags, reads_run=True),
    "merge": Command(run_merge, add_merge_flags, reads_run=True),
    "export": Command(run_export, add_export_flags, reads_run=True),
    "report": Command(run_report, computes=False),  # also shows a run under way
    "push": Command(run_push, add_push_flags, reads_run=True, computes=False),
}
