"""`make merge`: writes 16-bit safetensors with the adapter inside, and checks them against what was trained."""

import argparse
from pathlib import Path

from common.commands.flags import BASES, add_target_flags, require_choice
from common.machine.disk import format_bytes, refuse_target, write_checked_aside
from common.recipe import Recipe
from common.run.folder import refuse_inside


def add_merge_flags(parser: argparse.ArgumentParser) -> None:
    add_target_flags(parser)
    parser.add_argument("--kl-bound", type=float, default=1e-5, help="of the self-check, nats a token (default: 1e-5)")


def run_merge(recipe: Recipe, flags: argparse.Namespace) -> None:
    require_choice(flags.base, BASES, "BASE")
    target = flags.to or Path(f"{recipe.out}-merged")
    refuse_inside(target, recipe.out, "TO")
    refuse_target(target, folder=True, overwrite=flags.overwrite)
    print(f"reading the adapter in {recipe.out}", flush=True)
    from common.adapter.find import find_adapter
    from common.adapter.merge import MergedWeights, write_merged
    from common.adapter.merge_check import check_merged

    original = flags.base == "original"
    weights = MergedWeights(find_adapter(recipe), original=original)
    size = sum(shard.size for shard in weights.shards)
    with write_checked_aside(target, size, folder=True, overwrite=flags.overwrite) as folder:
        print(f"merging into {weights.describe_base()}, {format_bytes(size)}", flush=True)
        write_merged(weights, folder)
        print("self-check: the trained and the merged model read a few prompts, a layer at a time", flush=True)
        print(f"self-check: {check_merged(weights.adapter, folder, bound=None if original else flags.kl_bound)}")
    print(f"the merged model is in {target}; {describe_peak()}")


def describe_peak() -> str:
    """The highest resident memory of this process so far, for the last line of a command."""
    from common.machine.device import GIB, peak_ram

    return f"peak of host memory {peak_ram() / GIB:.2f} GiB"
