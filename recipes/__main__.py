"""`python -m recipes [--check] NAME [flags]`: runs, or only finds, recipes/NAME.py; a dash stands for an underscore.

`python -m recipes chat|eval|merge|export|report NAME [flags]`: what comes after a run, common.commands.

A new file beside this one is a new recipe; nothing is registered.
"""

import importlib
import os
import sys
import traceback
from pathlib import Path

from common.process_state import prepare_for_plan

if "--plan" in sys.argv:  # a plan takes seconds, most of them imports
    prepare_for_plan()

from common.cli import ERROR_STATUS, run
from common.commands import COMMANDS, run_command
from common.recipe import UserError

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    return sorted(p.stem.replace("_", "-") for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))


def main(arguments: list[str]) -> int:
    only_check = arguments[:1] == ["--check"]  # needs the standard library alone
    command = arguments[0] if arguments[:1] and arguments[0] in COMMANDS else None
    name, *flags = arguments[only_check or command is not None :] or [""]
    path = FOLDER / f"{name.replace('-', '_')}.py"
    if name.replace("_", "-") not in recipe_names():
        print(f"error: there is no recipe {name!r}; there are: {', '.join(recipe_names())}", file=sys.stderr)
        print("       your own: cp recipes/llama3_8b.py recipes/my_bot.py, then MODEL=my-bot", file=sys.stderr)
        return ERROR_STATUS
    if only_check:
        return 0
    try:
        recipe = importlib.import_module(f"recipes.{path.stem}")
        story, values = recipe.main, recipe.RECIPE
    except (UserError, TypeError, NameError, AttributeError, SyntaxError) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line, message = lines[-1] if lines else "?", str(error)
        if isinstance(error, SyntaxError):
            line, message = error.lineno or "?", error.msg
        print(f"error: {path.relative_to(FOLDER.parent)}:{line}: {message}", file=sys.stderr)
        return ERROR_STATUS
    if command:
        return run_command(command, name, values, flags)
    return run(story, values, flags)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if "--plan" in sys.argv:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # taking down what was imported would cost another second
    sys.exit(status)
