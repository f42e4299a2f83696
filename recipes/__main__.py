"""Runs a recipe, or another command on it.

    python -m recipes NAME [flags]            # fine-tunes with recipes/NAME.py; a dash stands for an underscore
    python -m recipes COMMAND NAME [flags]    # finetune, data, plan, dryrun, chat, eval, merge, export, report, push
    python -m recipes COMMAND NAME --help     # the flags of a command
    python -m recipes compare --runs "outputs/a outputs/b"
    python -m recipes --check NAME            # only says whether there is such a recipe
    python -m recipes --check-variables "TARGET" NAME ...    # only says whether make TARGET takes these variables
    torchrun --nproc-per-node 2 -m recipes NAME [flags]

A file beside this one is a recipe; nothing is registered.
"""

import ast
import importlib
import os
import re
import sys
import traceback
from pathlib import Path

from common.process_state import leave_out_compiler, prepare_for_plan, protect_output

if IS_PLAN := sys.argv[1:2] == ["plan"] or "--plan" in sys.argv:  # a plan takes seconds, most of them imports
    prepare_for_plan()
if IS_DATA := sys.argv[1:2] == ["data"]:  # so does a look at the data
    leave_out_compiler()

from common.cli import run, run_command
from common.commands import COMMANDS
from common.commands.compare import run_compare
from common.commands.make_variables import explain_variables
from common.machine.launch import ERROR_STATUS
from common.recipe import UserError

FOLDER = Path(__file__).parent
HELP = {"-h", "--help"}
MAKES_FILES = not (
    IS_PLAN
    or IS_DATA
    or {"--dry-run", *HELP} & {*sys.argv}
    or sys.argv[1:2] in ([], ["dryrun"], ["chat"], ["eval"], ["report"], ["compare"])
)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--check-variables"]:  # as --check
        lines = list(explain_variables(arguments[1].split(), arguments[2:]))
        print("".join(f"error: {line}\n" for line in lines), end="", file=sys.stderr)
        return ERROR_STATUS if lines else 0
    if not arguments or arguments[0] in HELP or (arguments[0] in COMMANDS and arguments[1:2] in (["-h"], ["--help"])):
        print(f"{(__doc__ or '').strip()}\n\nrecipes: {', '.join(recipe_names())}")
        return 0
    if arguments[0] == "compare":
        return run_compare(arguments[1:])
    command = arguments[0] if arguments and arguments[0] in (*COMMANDS, "--check") else None
    if command:
        arguments = arguments[1:]
    name, *flags = arguments or [""]
    if name.replace("_", "-") not in recipe_names():
        print(f"error: there is no recipe {name!r}; there are: {', '.join(recipe_names())}", file=sys.stderr)
        print("       your own: cp recipes/llama3_8b.py recipes/my_bot.py, then MODEL=my-bot", file=sys.stderr)
        return ERROR_STATUS
    if command == "--check":  # imports no recipe: it runs before the set-up, with the standard library alone
        return 0
    name = name.replace("_", "-")  # as recipe_name: the run of my_bot.py has one folder, however it is typed
    path = FOLDER / f"{name.replace('-', '_')}.py"
    try:
        module = importlib.import_module(f"recipes.{path.stem}")
        missing = [name for name in ("RECIPE", "main") if not hasattr(module, name)]
        if missing:
            raise UserError(
                f"it has no {missing[0]}; a recipe has RECIPE, its values, and main, what it does with them"
            )
        recipe, story = module.RECIPE, module.main
    except (UserError, TypeError, NameError, AttributeError, SyntaxError) as error:
        print(f"error: {describe_mistake(error, path)}", file=sys.stderr)
        return ERROR_STATUS
    return run_command(command, name, recipe, flags, story) if command else run(story, recipe, flags)


def recipe_names() -> list[str]:
    return sorted(path.stem.replace("_", "-") for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def describe_mistake(error: Exception, path: Path) -> str:
    """File, line where it is known, and message of what is wrong in the recipe at `path`."""
    if isinstance(error, SyntaxError):
        line, message = error.lineno, error.msg
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line, message = frames[-1].lineno if frames else None, str(error)
        line = line and _line_of_field(path, message, line)
    place = path.relative_to(FOLDER.parent)
    return f"{place}:{line}: {message}" if line else f"{place}: {message}"


def _line_of_field(path: Path, message: str, line: int) -> int:
    """The line of the field that the message of a spec begins with, in the call that `line` belongs to; else `line`."""
    begins = re.match(r"(\w+)(?:\.| has no )(\w+)", message)
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if begins else ():
        if isinstance(call, ast.Call) and call.lineno <= line <= (call.end_lineno or 0):
            if begins and ast.unparse(call.func).rpartition(".")[2] == begins[1]:
                return next((keyword.lineno for keyword in call.keywords if keyword.arg == begins[2]), line)
    return line


if __name__ == "__main__":
    protect_output(outlives_reader=MAKES_FILES)
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if IS_PLAN or IS_DATA:
        os._exit(status)  # an ordinary exit frees what was imported, which takes another second
    sys.exit(status)
