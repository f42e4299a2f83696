"""The few flags that every recipe shares. Any other change is an edit of the recipe."""

import argparse
import contextlib
import errno
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from common import REPOSITORY
from common.machine.launch import ERROR_STATUS, OTHERS_GONE, launch
from common.recipe import DataSpec, Recipe, Stopped, UserError, require
from common.run.folder import prepare_run_folder

SAID_BY_MAIN_SECONDS = 3
_RANK = os.environ.get("RANK", "0")  # set by torchrun; common.machine.processes has it too, and needs torch
# The disk is full, or the quota, or one may not write there.
NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
DRY_DATA = REPOSITORY / "data" / "tiny" / "train.jsonl"


def run(main: Callable[[Recipe], object], recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Runs a recipe with the flags in `arguments` (the command line's when None); the exit status.

    A UserError becomes one line on stderr and status 2; Ctrl-C status 130.
    """
    name = Path(main.__code__.co_filename).stem.replace("_", "-")
    parser = argparse.ArgumentParser(prog=f"make finetune MODEL={name} ARGS=...", description=recipe.model.name)
    parser.add_argument("--data", help="train on this file or hub data set instead of the recipe's")
    parser.add_argument("--out", help=f"output folder (default: outputs/{name})")
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop after N optimizer steps")
    parser.add_argument("--gpus", type=int, metavar="N", help="run on N GPUs of this machine, or plan for N")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="on so many machines, with --gpus each")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the machines find each other: one of them")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    plan = parser.add_argument_group("instead of a run")
    plan.add_argument("--plan", action="store_true", help="print and draw how the run would use the card (make plan)")
    plan.add_argument("--card-gib", type=float, metavar="GIB", help="plan for a card of this size")
    plan.add_argument("--seq-len", type=int, metavar="N", help="plan for rows of N tokens")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan there, for machines")
    plan.add_argument("--dry-run", action="store_true", help="a few steps with random weights (make dryrun)")
    plan.add_argument("--layers", type=int, metavar="N", help="of the dry run's model (default: all; 2 without a GPU)")
    flags = parser.parse_args(arguments)

    def start() -> int | None:
        configured = _with_flags(recipe, flags, name)
        if flags.plan:
            _show_plan(configured, flags, name)
        elif (flags.gpus is not None or flags.nnodes > 1) and "WORLD_SIZE" not in os.environ:
            train = dry(configured, flags.layers).train if flags.dry_run else configured.train
            return launch(train, 1 if flags.gpus is None else flags.gpus, flags.nnodes, flags.rdzv_endpoint)
        else:
            _start_run(main, dry(configured, flags.layers) if flags.dry_run else configured)
        return None

    try:
        return exit_status(start, flags.out or recipe.out or f"outputs/{name}")
    except Stopped as stop:
        if _RANK == "0":  # all processes stop
            out = f' OUT="{flags.out}"' if flags.out else ""
            data = f' DATA="{flags.data}"' if flags.data else ""
            gpus = f" GPUS={os.environ['WORLD_SIZE']}" if "WORLD_SIZE" in os.environ else ""
            print(f"\n{stop}. Go on with: make finetune MODEL={name}{gpus}{data}{out} ARGS=--resume", file=sys.stderr)
        return 128 + stop.signal_number


def exit_status(action: Callable[[], int | None], folder: str) -> int:
    """Does it; the exit status. What the user can mend becomes one line on stderr. folder: that it writes into."""
    try:
        return action() or 0
    except UserError as error:
        if _RANK != "0":  # the first one mostly says the same: then it ends this one meanwhile
            time.sleep(SAID_BY_MAIN_SECONDS)
        who = "" if _RANK == "0" else f"process {_RANK}: "
        print(f"\n{who}error: {error}", file=sys.stderr)
        return ERROR_STATUS
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in NO_WRITING:
            raise
        print(f"\nerror: {error.filename or folder} cannot be written: {error.strerror}", file=sys.stderr)
        return ERROR_STATUS
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ or not _is_of_others(error):
            raise
        return OTHERS_GONE


def _is_of_others(error: BaseException) -> bool:
    """Whether another process went away while this one talked to it."""
    names = ("DistBackendError", "DistNetworkError", "DistStoreError")
    return type(error).__name__ in names or "gloo/transport" in str(error)


def _with_flags(recipe: Recipe, flags: argparse.Namespace, name: str) -> Recipe:
    if flags.data:  # the recipe's own held-out rows belong to the recipe's own data
        recipe = replace(recipe, data=replace(recipe.data, source=flags.data, eval_source=None, revision=None))
    if flags.max_steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, max_steps=flags.max_steps))
    if flags.seq_len is not None:
        require(flags.plan, "--seq-len is for a plan; for a run, edit TrainSpec.seq_len in the recipe")
        recipe = replace(recipe, train=replace(recipe.train, seq_len=flags.seq_len))
    if flags.card_gib is not None:
        require(flags.plan, "--card-gib is for a plan; a run uses what is free on the GPU of the machine")
        recipe = replace(recipe, card_gib=flags.card_gib)
    existing = "resume" if flags.resume else "overwrite" if flags.overwrite else recipe.existing_run
    return replace(recipe, out=flags.out or recipe.out or f"outputs/{name}", existing_run=existing)


def _start_run(main: Callable[[Recipe], object], recipe: Recipe) -> None:
    quiet_libraries()
    from common.machine import processes
    from common.machine.device import require_gpu_per_process

    tracker = recipe.train.report_to
    require(
        tracker == "none" or importlib.util.find_spec(tracker) is not None,
        f"TrainSpec.report_to is {tracker!r}, which is not installed: .venv/bin/pip install {tracker}",
    )
    require_gpu_per_process()
    processes.init_distributed()
    processes.run_on_main(lambda: prepare_run_folder(recipe.out, recipe.existing_run))
    require(
        Path(recipe.out).is_dir(),
        f"{recipe.out} is not on every machine: several machines need a disk that they share, for the checkpoints",
    )
    try:
        main(recipe)
    finally:
        with contextlib.suppress(OSError):
            Path(recipe.out).rmdir()  # if it is still empty: nothing was run


def _show_plan(recipe: Recipe, flags: argparse.Namespace, name: str) -> None:
    """Prints the plan for the card asked for, else the machine's GPU, else the recipe's card, and draws it."""
    quiet_libraries()
    from common.machine.device import this_machine
    from common.plan.card import Card
    from common.plan.machine_plan import plan_for_card, setting_of
    from common.plan.picture import draw_plan
    from common.plan.plan import choose_option
    from common.plan.report import build_report
    from common.plan.report_json import write_json

    machine = this_machine()
    if flags.card_gib is None and machine.is_gpu:
        card, setting = Card.of_machine(machine), setting_of(machine)
    elif recipe.card_gib is not None:
        card, setting = Card.of_size(recipe.card_gib), None
    else:
        plan_for_card(recipe)
        print("  a CPU's memory is not planned; for a GPU: make plan CARD_GIB=24")
        return
    report = build_report(*choose_option(recipe, card, setting, (flags.gpus or 1) * flags.nnodes))
    print(report.text())
    picture = flags.json.with_suffix(".png") if flags.json else Path("outputs") / f"plan-{name}.png"
    if not flags.json:
        picture.parent.mkdir(exist_ok=True)
    draw_plan(report, picture)
    if flags.json:
        write_json(report, flags.json)
    print(f"drawn in {picture}" + (f", written in {flags.json}" if flags.json else ""))


def dry(recipe: Recipe, layers: int | None = None) -> Recipe:
    """The recipe with random weights and the small data set that ships, a few steps long: nothing is downloaded.

    Without a GPU the model is cut to two layers and the rows are short, so that it takes minutes and fits in memory.
    """
    quiet_libraries()
    from common.machine.device import this_machine
    from common.machine.processes import world_size

    train = replace(recipe.train, max_steps=4, eval_every=1000, save_every=1000, sample_answers=0)
    if not this_machine().is_gpu:
        layers = layers or 2
        if world_size() > 1 and recipe.card_gib and train.sharding == "auto":  # as its own cards would have it
            from common.plan.card import Card
            from common.plan.plan import fits_whole

            whole = fits_whole(recipe, Card.of_size(recipe.card_gib), world_size())
            train = replace(train, sharding="never" if whole else "always")
        train = replace(train, seq_len=min(train.seq_len, 256), rows_per_step=2, max_steps=2)
        recipe = replace(recipe, card_gib=None)
    return replace(
        recipe,
        model=replace(recipe.model, weights="random", layers=layers, chat_template=None),
        data=DataSpec(str(DRY_DATA), eval_rows=8),
        train=train,
        out=f"{recipe.out}-dry-run",
        existing_run="overwrite",
    )


def quiet_libraries() -> None:
    """Silences what libraries say about themselves and nobody can act on; our own lines stay readable."""
    # PEFT 0.21 reads a name that transformers 5.23 calls deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # What accelerate advises instead would send the 4-bit weights to all.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    # FSDP2 warns so of our decoder layers, whose outputs nobody writes into.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*", category=UserWarning)
    if not sys.stderr.isatty():  # datasets reads it when it is imported, which a plan never does
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
