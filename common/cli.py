"""From the words that a user typed to a command: parses its flags, runs it, returns the exit status."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from common.commands import COMMANDS
from common.commands.flags import choose_gpu
from common.commands.make_variables import MAKE_NEW
from common.commands.set_fields import refuse_typed_twice, set_fields
from common.exit_status import exit_status
from common.machine.processes import is_main_process
from common.process_state import ignored_variables, quiet_libraries
from common.recipe import SPECS, Recipe
from common.run.folder import hold_for_reading, put_old_run_back
from common.run.recipe_main import recipe_name, with_output_folder

Story = Callable[[Recipe], object]
INSTEAD_OF_A_RUN = {"--plan": "plan", "--dry-run": "dryrun"}  # flags of finetune that stand for other commands


def run(story: Story, recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Fine-tunes: runs a recipe's story, its `main`. Returns the exit status.

    arguments: the flags of the finetune command; None takes the command line's.
    """
    return run_command("finetune", recipe_name(story), recipe, sys.argv[1:] if arguments is None else arguments, story)


def run_command(command: str, name: str, recipe: Recipe, arguments: Sequence[str], story: Story | None = None) -> int:
    """Runs one of COMMANDS on a recipe. Returns the exit status, as exit_status describes it.

    name: the recipe's, as typed. story: the recipe's `main`, which finetune and dryrun need. Beside its own flags a
    command finds `out`, `recipe_name` and `story` in the parsed ones.
    """
    instead = [flag for flag in INSTEAD_OF_A_RUN if flag in arguments] if command == "finetune" else []
    if instead:
        command, arguments = INSTEAD_OF_A_RUN[instead[0]], [word for word in arguments if word != instead[0]]
    parser = argparse.ArgumentParser(
        prog=f"make {command} MODEL={name} ARGS=...", description=recipe.model.name, allow_abbrev=False
    )
    parser.set_defaults(recipe_name=name, story=story)
    parser.add_argument("--out", help=f"folder of the run (default: outputs/{name})")
    parser.add_argument("--set", default="", metavar="FIELDS", help="values of the recipe: 'train.seed=2 lora.rank=64'")
    if add_flags := COMMANDS[command].add_flags:
        add_flags(parser)
    flags = parser.parse_args(arguments)
    quiet_libraries()
    recipe = with_output_folder(recipe, name, flags.out)

    def act() -> int | None:
        if ignored_variables:
            print(
                f"note: {' and '.join(ignored_variables)} in the environment is ignored: no launcher has set the "
                "others that go with it",
                file=sys.stderr,
            )
        if is_main_process():
            put_old_run_back(recipe.out)
        if COMMANDS[command].computes:
            choose_gpu(flags)
        with hold_for_reading(recipe.out) if COMMANDS[command].reads_run else nullcontext():
            refuse_typed_twice(flags)
            parts = tuple(SPECS) if command in MAKE_NEW else ("model",)
            return COMMANDS[command].run(set_fields(recipe, flags.set, parts), flags)

    return exit_status(act, recipe.out)
