"""`make finetune`: runs a recipe, in this process or in one process per GPU."""

import argparse
import os
import sys
import time
from pathlib import Path

from common.commands.flags import add_run_flags, apply_run_flags, has_several_processes
from common.machine.launch import launch
from common.machine.processes import is_main_process
from common.recipe import Recipe, Stopped, require
from common.run.folder import CHECKPOINTS, refuse_run_under_way
from common.run.provenance import make_command
from common.run.recipe_main import run_story


def add_finetune_flags(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser)
    instead = parser.add_argument_group("instead of a run")
    instead.add_argument("--plan", action="store_true", help="print and draw how the run would use the card: make plan")
    instead.add_argument("--dry-run", action="store_true", help="a few steps with random weights: make dryrun")
    # Flags of a plan, which a run refuses with a reason.
    parser.add_argument("--seq-len", help=argparse.SUPPRESS)
    parser.add_argument("--card-gib", help=argparse.SUPPRESS)


def run_finetune(recipe: Recipe, flags: argparse.Namespace) -> int | None:
    """Raises UserError for a flag of a plan, and as start_run."""
    require(flags.seq_len is None, "--seq-len is for a plan; for a run, edit TrainSpec.seq_len in the recipe")
    require(flags.card_gib is None, "--card-gib is for a plan; a run uses what is free on the GPU of the machine")
    return start_run(apply_run_flags(recipe, flags), flags, hint=f". Go on with: {_resume_command(flags)}")


def _resume_command(flags: argparse.Namespace) -> str:
    typed = {"GPU": flags.gpu, "DATA": flags.data, "OUT": flags.out, "SET": flags.set}
    variables = {"MODEL": flags.recipe_name, "GPUS": os.environ.get("WORLD_SIZE")} | typed
    steps = ["--max-steps", str(flags.max_steps)] if flags.max_steps is not None else []
    return make_command("finetune", variables, [*steps, "--resume"])


def start_run(recipe: Recipe, flags: argparse.Namespace, *, hint: str = "") -> int | None:
    """Runs the recipe's story in this process; where --gpus or --nnodes are more than 1, starts those of the run.

    hint: printed behind the message when a signal stops a run that has a checkpoint. Returns the exit status; None when
    the run has ended. Raises UserError as launch and run_story.
    """
    if is_main_process():
        refuse_run_under_way(recipe.out)  # at once: what follows imports torch, and may start processes
    is_launched = "WORLD_SIZE" in os.environ  # by launch or by torchrun: this is one of the run's processes
    if has_several_processes(flags) and not is_launched:
        return launch(recipe.train, flags.gpus or 1, flags.nnodes, flags.rdzv_endpoint)
    status, started = None, time.time()
    try:
        run_story(flags.story, recipe)
    except Stopped as stop:
        if is_main_process():  # all processes stop
            print(f"\n{stop}{hint if stop.can_go_on else ''}", file=sys.stderr)
        status = 128 + stop.signal_number
    except KeyboardInterrupt:  # who insists, or stops it where no step is under way
        newest = _newest_checkpoint(recipe, started)
        if newest is None:
            raise
        if is_main_process():
            print(f"\nstopped at once; the newest checkpoint is {newest}{hint}", file=sys.stderr)
        return 130
    from common.machine.collectives import shut_down_distributed

    # Not after an error: the others may not come here, and NCCL would wait for them.
    shut_down_distributed()
    return status


def _newest_checkpoint(recipe: Recipe, started: float) -> Path | None:
    """None where the run has none: after --overwrite the folder may hold those of the run that was put back."""
    from common.run.checkpoints import list_checkpoints

    newest = next(iter(list_checkpoints(Path(recipe.out) / CHECKPOINTS)), None)
    put_back = newest is not None and recipe.existing_run == "overwrite" and newest.stat().st_mtime < started
    return None if put_back else newest
