"""Prints the tables of plans in docs/memory.md and docs/long_rows.md, and of what a layer saves in docs/speed.md.

    python -m benchmarks.plan_table            # two minutes
    python -m benchmarks.plan_table --write    # and writes them into the pages, and the peaks into the README's table

tests/benchmarks/test_plan_table.py compares the pages with it.
"""

import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from benchmarks.models import recipe_of
from common.machine.device import GIB
from common.model.activation_checkpointing import Policy
from common.plan.card import WORKSPACE_BYTES, Card
from common.plan.forecast import Forecast
from common.plan.planner import Planner
from common.plan.report import way_in_tiles
from common.plan.speed import speed_of
from common.process_state import quiet_libraries
from common.recipe import Kernels, ModelSpec

MODELS = ("mistral-7b", "llama3-8b", "llama3-8b-dpo", "qwen-14b")  # llama3-1-8b is of the size of llama3-8b
CARDS = (24, 16, 12)  # GiB
LARGEST, STREAMING_CARDS = "llama3-70b", (24, 16, 12, 8)
LONG_ROW_CARDS = (8, 12, 16, 24, 48, 80)  # GiB
BASES = (
    "mistralai/Mistral-7B-Instruct-v0.3",
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "Qwen/Qwen2.5-14B-Instruct",
    "Qwen/Qwen3-14B",
)
# The longest row of Llama 3.1 8B in 4 bits, rank 32 on all linear layers, micro-batch 1, by GiB of the card: that of
# unsloth, and of transformers with FlashAttention-2 (unsloth.ai/docs/basics/unsloth-benchmarks, made in January
# 2025). The GPU is the one whose speed is modelled.
LONG_ROWS, UNSLOTH_RANK = "llama3-1-8b", 32
UNSLOTH_2025 = {
    8: ("2,972", "none"),
    12: ("21,848", "932"),
    16: ("40,724", "2,551"),
    24: ("78,475", "5,789"),
    48: ("191,728", "15,502"),
    80: ("342,733", "28,454"),
}
# Rows of the models' own positions, and of more: recipe, tokens, YaRN's factor on 32,768 positions.
LONG_LENGTHS = (
    ("llama3-1-8b", 16_384, None),
    ("llama3-1-8b", 131_072, None),
    ("mistral-7b", 32_768, None),
    ("mistral-7b", 131_072, 4.0),
    ("qwen-14b", 40_960, None),
    ("qwen-14b", 131_072, 4.0),
)
GPU_OF_SIZE = {48: "L40S", 80: "A100"}  # RTX 4090 for all others
# From a hosting company's guide, which does not give its settings: GB without and with activation checkpointing, and
# how much slower training is with it.
PUBLISHED = {"mistral-7b": (26, 12, "25 %"), "llama3-8b": (17, 11, "20 %"), "qwen-14b": (38, 18, "25 %")}


def activation_lines() -> list[str]:
    """For each base model the KiB a token that an inner layer saves for backward, stock and lean, without recompute."""
    lines = []
    for base in BASES:
        model, saved = ModelSpec(base, weights="random", layers=3), {}
        for kernels in ("stock", "lean"):
            saved[kernels] = saved_per_token(model, kernels)
        lines.append(f"| {base.split('/')[1]} | {saved['stock']:.1f} KiB | {saved['lean']:.1f} KiB |")
    return lines


def saved_per_token(model: ModelSpec, kernels: Kernels) -> float:
    """KiB a token, from two counts: what is saved whatever the tokens cancels out."""
    recipe = recipe_of("llama3-8b")
    forecast = Forecast(replace(recipe, model=model, train=replace(recipe.train, kernels=kernels)))
    short, long = (forecast.count(n, Policy(3, 3), True).segment("forward 1").net for n in (1024, 2048))
    return (long - short) / 1024 / 1024


def published_lines() -> list[str]:
    """The published peaks beside ours: without recompute, and with as little as stays below the published peak."""
    lines = []
    for name, (without, with_recompute, slower) in PUBLISHED.items():
        planner = Planner(recipe_of(name), Card("the published peak", int(with_recompute * 1e9)))
        layers = planner.layers
        everything, _ = planner.exact(1, Policy(layers, layers))
        best = planner.keep_most_layers(1)
        assert best is not None
        cost = best.seconds_per_token / everything.seconds_per_token - 1
        peaks = [(option.peak + WORKSPACE_BYTES) / 1e9 for option in (everything, best)]
        lines.append(
            f"| `{name}` | {without} GB | {peaks[0]:.1f} GB | {with_recompute} GB, {slower} slower "
            f"| {peaks[1]:.1f} GB, {best.policy.recomputed} of {layers} layers recompute, {cost:.0%} slower |"
        )
    return lines


def plan_lines() -> list[str]:
    """One line of Markdown for each model and card."""
    lines = []
    for name in MODELS:
        for gib in CARDS:
            planner = Planner(recipe_of(name), Card.of_size(gib))
            best = planner.choose()
            if best is None:
                lines.append(f"| `{name}` | {gib} GiB | does not fit | – | – | – |")
                continue
            kept = f"{best.policy.kept or 'none'} of {best.policy.layers}" if best.policy.recomputed else "all"
            host = ", inputs of the others on the host" if best.policy.offload else ""
            split = f"{best.rows} × {planner.recipe.train.most_rows_per_step // best.rows}"
            longest = [planner.longest_row(Policy(planner.layers, offload=offload)) for offload in (False, True)]
            lines.append(
                f"| `{name}` | {gib} GiB | {split} | {kept}{host} "
                f"| {(best.peak + WORKSPACE_BYTES) / GIB:.1f} GiB | {longest[0]:,} / {longest[1]:,} |"
            )
    return lines


def long_row_lines() -> list[str]:
    """For each model and card the longest row, layers' inputs on the host: without tiles, and for each way in tiles."""
    lines = []
    for name in dict.fromkeys(name.removesuffix("-dpo") for name in MODELS):  # preferences change no row's memory
        planner = Planner(recipe_of(name), Card.of_size(24))
        in_tiles = planner.policies_in_tiles("offload")
        for gib in LONG_ROW_CARDS:
            planner.card = Card.of_size(gib)
            leanest = {way_in_tiles(policy): policy for policy in in_tiles}
            ways = (Policy(planner.layers, offload=True), *leanest.values())
            longest = [planner.longest_option(policy) for policy in ways]
            tokens = " | ".join(f"{row:,}" if row else "–" for row, _ in longest)
            row, option = longest[-1]
            host = f"{option.host_bytes / GIB:.0f} GiB" if row else "–"
            lines.append(f"| {name}, {gib} GiB | {tokens} | {host} |")
    return lines


def long_length_lines() -> list[str]:
    """What is planned on 24 GiB for rows of LONG_LENGTHS, two an optimizer step."""
    lines = []
    for name, tokens, factor in LONG_LENGTHS:
        recipe = recipe_of(name)
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 32_768}
        model = replace(recipe.model, rope_scaling=yarn if factor else None)
        train = replace(recipe.train, seq_len=tokens, rows_per_step=2)
        best = Planner(replace(recipe, model=model, train=train), Card.of_size(24)).choose()
        assert best is not None
        scaled = f"YaRN, factor {factor:g}" if factor else "–"
        lines.append(
            f"| `{name}` | {tokens:,} | {scaled} | {(best.peak + WORKSPACE_BYTES) / GIB:.1f} GiB "
            f"| {best.host_bytes / GIB:.1f} GiB | {1 / best.seconds_per_token:,.0f} |"
        )
    return lines


def beside_peers_lines() -> list[str]:
    """For each card the longest row of Llama 3.1 8B beside the published one, with host memory and modelled speed."""
    recipe = recipe_of(LONG_ROWS)
    recipe = replace(recipe, lora=replace(recipe.lora, rank=UNSLOTH_RANK))
    planner = Planner(recipe, Card.of_size(24))
    policy = planner.policies_in_tiles("offload")[-1]
    lines = []
    for gib, (unsloth, trainer) in UNSLOTH_2025.items():
        planner.card = Card.of_size(gib)
        on_host = 0
        tokens, option = planner.longest_option(policy)
        if not tokens:  # the weights have to wait in host memory
            on_host = planner.layers
            tokens, option = planner.longest_option(policy, on_host)
        weights = ", with the weights" * bool(on_host)
        gpu = GPU_OF_SIZE.get(gib, "RTX 4090")
        # As one example: attention's arithmetic grows with the square.
        forecast = Forecast(replace(recipe, train=replace(recipe.train, seq_len=tokens)))
        seconds = forecast.step(tokens, policy, on_host=on_host).seconds(speed_of(gpu))
        lines.append(
            f"| Llama 3.1 8B, {gib} GiB | {trainer} | {unsloth} | {tokens:,} "
            f"| {option.host_bytes / GIB:.0f} GiB{weights} | {tokens / seconds:,.0f} ({gpu}) |"
        )
    return lines


def policy_lines(name: str = "llama3-8b") -> list[str]:
    """For each policy its peak, its host memory and its time, with a micro-batch of one row of the recipe."""
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


def smallest_lines() -> list[str]:
    """For each recipe the smallest card, in whole GiB, that one row fits: all weights on it, and all layers streaming.

    With every layer recomputing and its input in host memory, the leanest that a plan does.
    """
    lines = []
    for name in (*MODELS, LARGEST):
        planner = Planner(recipe_of(name), Card.of_size(24))
        leanest = Policy(planner.layers, offload=True)
        cells = []
        for place, on_host in ((planner, 0), (planner.leaner(), planner.layers)):
            option, step = place.exact(1, leanest, on_host)
            gib = next(gib for gib in range(1, 200) if option.peak <= Card.of_size(gib).budget)
            cells.append(f"{gib} GiB, {step.host_peak() / GIB:.1f} GiB")
        lines.append(f"| `{name}` on the smallest card | {cells[0]} | {cells[1]} |")
    return lines


def streaming_lines() -> list[str]:
    """For each card what is planned for the largest recipe on one of it: what streams, and what that costs."""
    lines = []
    for gib in STREAMING_CARDS:
        planner = Planner(recipe_of(LARGEST), Card.of_size(gib))
        best = planner.choose()
        if best is None:
            policy, leaner = Policy(planner.layers, offload=True), planner.leaner()
            over = (leaner.exact(1, policy, planner.layers)[0].peak - planner.card.budget) / GIB
            row = leaner.longest_row(policy, planner.layers)
            lines.append(
                f"| `{LARGEST}` | one of {gib} GiB | {over:.1f} GiB too small; a row of {row:,} tokens fits "
                "| – | – | – | – |"
            )
            continue
        on_card, _ = planner.exact(best.rows, best.policy)
        split = f"{best.rows} × {planner.recipe.train.most_rows_per_step // best.rows}"
        embedding = " and the embedding" * best.embedding_on_host
        lines.append(
            f"| `{LARGEST}` | one of {gib} GiB | {split} | {best.policy.recomputed} of {best.policy.layers} "
            f"| {best.on_host} of {best.policy.layers}{embedding}, {best.host_bytes / GIB:.1f} GiB "
            f"| {(best.peak + WORKSPACE_BYTES) / GIB:.1f} GiB "
            f"| {best.seconds_per_token / on_card.seconds_per_token:.3f} |"
        )
    return lines


def write_tables(page: Path, lines: list[str]) -> None:
    """Puts each line in the place of the one in the page that begins with the same two cells, or the same one."""
    text = page.read_text(encoding="utf-8")
    for line in lines:
        cells = line.split(" | ")
        key = " | ".join(cells[: 2 if cells[0].startswith("| `") else 1]) + " |"
        text, found = re.subn(rf"^{re.escape(key)}.*$", lambda _, line=line: line, text, flags=re.MULTILINE)  # type: ignore[misc]
        assert found == 1, f"{page} has {found} lines that begin with {key}"
    page.write_text(text, encoding="utf-8")


def write_readme(page: Path, plans: list[str], long_lengths: list[str]) -> None:
    """Puts the planned peaks on 24 GiB into the table of recipes. plans, long_lengths: of those functions."""
    text = page.read_text(encoding="utf-8")
    peaks = {name: next(line for line in plans if line.startswith(f"| `{name}` | 24 GiB |")) for name in MODELS}
    peaks[LONG_ROWS] = long_lengths[0]
    for name, line in peaks.items():
        peak = re.findall(r"[\d.]+ GiB", line.removeprefix(f"| `{name}` | 24 GiB |"))[0]
        text, found = re.subn(rf"(?m)^(\| `{name}` \|.*\| )[\d.]+ GiB(; [^|]*)? \|$", rf"\g<1>{peak}\g<2> |", text)
        assert found == 1, f"{page} has {found} lines of {name}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    quiet_libraries()
    tables = activations, plans, policies, published, smallest, streaming, long_rows, long_lengths, beside_peers = (
        activation_lines(),
        plan_lines(),
        policy_lines(),
        published_lines(),
        smallest_lines(),
        streaming_lines(),
        long_row_lines(),
        long_length_lines(),
        beside_peers_lines(),
    )
    print("\n\n".join("\n".join(lines) for lines in tables))
    if "--write" in sys.argv:
        root = Path(__file__).parents[1]
        write_tables(root / "docs" / "speed.md", activations)
        write_tables(root / "docs" / "memory.md", [*plans, *policies, *published, *smallest, *streaming, *long_rows])
        write_tables(root / "docs" / "long_rows.md", [*long_lengths, *beside_peers])
        write_readme(root / "README.md", plans, long_lengths)
    sys.exit(0)
