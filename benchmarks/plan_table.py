"""The README's table of plans: each recipe on cards of 24, 16 and 12 GiB, and what each policy saves and costs.

python -m benchmarks.plan_table        # about a minute; tests/test_plan_table.py holds the README to it
"""

import importlib
import sys
import warnings

from common.activation_checkpointing import Policy
from common.cli import quiet_libraries
from common.machine import GIB
from common.planner import WORKSPACE_BYTES, Card, Planner
from common.recipe import Recipe, UserError

MODELS = ("mistral-7b", "llama3-8b", "qwen-14b")
CARDS = (24, 16, 12)  # GiB


def recipe_of(name: str) -> Recipe:
    recipe: Recipe = importlib.import_module(f"recipes.{name.replace('-', '_')}").RECIPE
    return recipe


def plan_lines() -> list[str]:
    """One line of Markdown for each model and card."""
    lines = []
    for name in MODELS:
        for gib in CARDS:
            planner = Planner(recipe_of(name), Card.of_size(gib))
            try:
                best = planner.choose()
            except UserError:
                lines.append(f"| `{name}` | {gib} GiB | does not fit | – | – | – |")
                continue
            kept = f"{best.policy.kept or 'none'} of {best.policy.layers}" if best.policy.recomputed else "all"
            host = ", inputs of the others on the host" if best.policy.offload else ""
            split = f"{best.rows} × {planner.recipe.train.rows_per_step // best.rows}"
            longest = [planner.longest_row(Policy(planner.layers, offload=offload)) for offload in (False, True)]
            lines.append(
                f"| `{name}` | {gib} GiB | {split} | {kept}{host} "
                f"| {(best.peak + WORKSPACE_BYTES) / GIB:.1f} GiB | {longest[0]:,} / {longest[1]:,} |"
            )
    return lines


def policy_lines(name: str = "llama3-8b") -> list[str]:
    """What each policy needs and costs, at one row of the recipe."""
    planner = Planner(recipe_of(name), Card.of_size(24))
    layers = planner.layers
    reference = planner.exact(1, Policy(layers, layers))[0].seconds_per_token
    lines = []
    for label, policy in {
        "none": Policy(layers, layers),
        f"some: the last {layers // 2} of {layers} layers keep theirs": Policy(layers, layers // 2),
        "every layer, attention kept": Policy(layers, keep_attention=True),
        "every layer": Policy(layers),
        "every layer, inputs on the host": Policy(layers, offload=True),
    }.items():
        option, step = planner.exact(1, policy)
        host = f"{step.host_peak() / GIB:.1f} GiB" if policy.offload else "–"
        peak = f"{(option.peak + WORKSPACE_BYTES) / GIB:.1f} GiB"
        lines.append(f"| {label} | {peak} | {host} | {option.seconds_per_token / reference:.2f} |")
    return lines


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    quiet_libraries()
    print("\n".join([*plan_lines(), "", *policy_lines()]))
    sys.exit(0)
