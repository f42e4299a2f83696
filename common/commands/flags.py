"""The flags that several commands take, and what they change in the recipe."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from common.machine.gpus import use_one_gpu
from common.machine.paths import output_path
from common.recipe import DataSpec, Recipe, UserError, require

BASES = ("4bit", "original")


def whole_number(minimum: int) -> Callable[[str], int]:
    """A type for argparse: int from `minimum` on. Anything else ends the command with argparse's own message."""

    def parse(text: str) -> int:
        number = int(text) if text.removeprefix("-").isdecimal() else None
        if number is None or number < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {minimum} on")
        return number

    return parse


def add_gpu_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of a command that computes."""
    parser.add_argument("--gpu", metavar="N", help="compute on this GPU, as nvidia-smi counts (default: the first)")


def choose_gpu(flags: argparse.Namespace) -> None:
    """Hides all GPUs but one from a process that computes by itself. Raises UserError as use_one_gpu.

    A process that starts those of a run on several GPUs hides none, nor do they; nor a plan for a kind of GPU. To be
    called before torch is imported.
    """
    if getattr(flags, "plans_for_kinds", False):
        from common.plan.speed import named_gpu  # imports numpy

        if named_gpu(flags.gpu) is not None:
            return
    several = has_several_processes(flags) or "LOCAL_RANK" in os.environ
    require(
        flags.gpu is None or not several,
        f"GPU={flags.gpu} is for a run in one process; for GPUS=2, CUDA_VISIBLE_DEVICES=0,2 chooses the GPUs",
    )
    if not several:
        use_one_gpu(flags.gpu)


def has_several_processes(flags: argparse.Namespace) -> bool:
    """Returns whether --gpus and --nnodes ask for a run in more than one process."""
    return (getattr(flags, "gpus", None) or 1) * getattr(flags, "nnodes", 1) > 1


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a run. A plan and a dry run take them too: they look at the same run."""
    add_gpu_flag(parser)
    parser.add_argument("--data", help="train on these files or hub data set instead of the recipe's")
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop after N optimizer steps")
    count = whole_number(1)
    parser.add_argument("--gpus", type=count, metavar="N", help="run on N GPUs of this machine, or plan for N")
    parser.add_argument("--nnodes", type=count, default=1, metavar="N", help="on so many machines, with --gpus each")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the machines find each other: one of them")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")


def apply_run_flags(recipe: Recipe, flags: argparse.Namespace) -> Recipe:
    """The recipe with what the flags of add_run_flags say. Raises UserError for a value that is out of range."""
    if flags.data:
        recipe = replace_data(recipe, flags.data)
    if flags.max_steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, max_steps=flags.max_steps))
    existing = "resume" if flags.resume else "overwrite" if flags.overwrite else recipe.existing_run
    return replace(recipe, existing_run=existing)


def replace_data(recipe: Recipe, source: str) -> Recipe:
    """The recipe with another source."""
    return replace(recipe, data=other_data(recipe.data, source))


def other_data(spec: DataSpec, source: str) -> DataSpec:
    """The spec with another source. Its own held-out rows belong to its own data."""
    return replace(spec, source=source, sources=(), eval_source=None, revision=None, config=None)


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that writes a merged model."""
    add_gpu_flag(parser)
    parser.add_argument(
        "--base", default="4bit", help="merge into the base as it was trained (4bit) or the original one"
    )
    parser.add_argument("--to", type=output_path, help="where to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def require_choice(value: str, choices: Sequence[str], name: str) -> None:
    """Raises UserError, with the name that the variable has in the Makefile, unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
