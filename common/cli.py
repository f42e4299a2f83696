"""The few flags that every recipe shares. Any other change is an edit of the recipe."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from common.recipe import Recipe, UserError
from common.run_folder import prepare_run_folder

ERROR_STATUS = 2


def run(main: Callable[[Recipe], object], recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Runs a recipe with the flags in `arguments` (the command line's when None); the exit status.

    A UserError becomes one line on stderr and status 2; Ctrl-C status 130.
    """
    name = Path(main.__code__.co_filename).stem.replace("_", "-")
    parser = argparse.ArgumentParser(prog=f"make finetune MODEL={name} ARGS=...", description=recipe.model.name)
    parser.add_argument("--data", help="train on this file or hub data set instead of the recipe's")
    parser.add_argument("--out", help=f"output folder (default: outputs/{name})")
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop after N optimizer steps")
    parser.add_argument("--plan", action="store_true", help="print how the run would use the card, and stop")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    flags = parser.parse_args(arguments)
    try:
        _run(main, _with_flags(recipe, flags, name), plan_only=flags.plan)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return ERROR_STATUS
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def _with_flags(recipe: Recipe, flags: argparse.Namespace, name: str) -> Recipe:
    if flags.data:  # the recipe's own held-out rows belong to the recipe's own data
        recipe = replace(recipe, data=replace(recipe.data, source=flags.data, eval_source=None, revision=None))
    if flags.max_steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, max_steps=flags.max_steps))
    existing = "resume" if flags.resume else "overwrite" if flags.overwrite else recipe.existing_run
    return replace(recipe, out=flags.out or recipe.out or f"outputs/{name}", existing_run=existing)


def _run(main: Callable[[Recipe], object], recipe: Recipe, *, plan_only: bool) -> None:
    quiet_libraries()
    if plan_only:
        from common.planner import plan_for_card

        plan_for_card(recipe, dry=True)
        return
    folder = prepare_run_folder(recipe.out, recipe.existing_run)
    try:
        main(recipe)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is still empty: nothing was run


def quiet_libraries() -> None:
    """Silences what libraries say about themselves and nobody can act on; our own lines stay readable."""
    # PEFT 0.21 reads a name that transformers 5.23 calls deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    if not sys.stderr.isatty():
        import datasets

        datasets.disable_progress_bars()
