"""What a user reads when nothing fits: the arithmetic, and the changes of the recipe that would fit."""

from collections.abc import Iterator
from dataclasses import replace

from common.machine.device import GIB
from common.plan.planner import Option, Planner
from common.plan.step import ADAPTERS, EMBEDDINGS, GRADIENTS, OPTIMIZER, WEIGHTS, Step
from common.recipe import Checkpointing, UserError

CHECKPOINTING_BY_MEMORY: tuple[Checkpointing, ...] = ("every layer", "offload")  # from fast to lean


def choose_or_explain(planner: Planner) -> Option:
    """The fastest option that fits. Raises UserError, with what would fit, when not even one row does."""
    option = planner.choose()
    if option is None:
        raise UserError(explain_misfit(planner))
    return option


def explain_misfit(planner: Planner) -> str:
    """One line: what the leanest way to run one row takes, how much that is too much, and what to change."""
    wanted, card = planner.recipe.train.checkpointing, planner.card
    leanest, step = planner.leanest(wanted, planner.offload_choices()[-1])
    excess = leanest.peak - card.budget
    if excess <= 0 and card.host_bytes is not None:
        return (
            f"the layers' parts and inputs do not fit the host memory: {leanest.host_bytes / GIB:.1f} GiB for each "
            f"card, and {card.host_bytes / GIB:.1f} GiB are available for it. "
            "Take shorter rows, more cards, or more host memory"
        )
    arithmetic = _arithmetic(planner, leanest, sum(step.resident.values()))
    if step.resident[WEIGHTS] + step.resident[EMBEDDINGS] > card.budget:
        return arithmetic + f"The model alone is too large: take a smaller model, or {_more_memory(planner)}"
    changes = list(_changes_that_fit(planner, leanest, step, excess))
    return arithmetic + ("What would fit: " + ", or ".join(changes) if changes else "Take a smaller model")


def _arithmetic(planner: Planner, leanest: Option, resident: int) -> str:
    card = planner.card
    return (
        f"one row of {planner.seq_len:,} tokens does not fit {card.name}{_sharing(planner)}: "
        f"{resident / GIB:.1f} GiB for the model and its adapters + {(leanest.peak - resident) / GIB:.1f} GiB for the "
        f"row is {(leanest.peak - card.budget) / GIB:.1f} GiB over the budget of {max(0, card.budget) / GIB:.1f} GiB "
        f"({leanest.policy}). "
    )


def _sharing(planner: Planner) -> str:
    """How several cards share the model; nothing for one card."""
    layout = planner.layout
    if layout.processes == 1:
        return ""
    return f", {replace(layout, on_host=planner.layers)}" if layout.sharded else f", {layout}"


def _more_memory(planner: Planner) -> str:
    if planner.layout.processes == 1:
        return "a larger card, or let several share it (make plan GPUS=2 shows what each would hold)"
    return "larger cards, or more of them" if planner.layout.sharded else "let the cards share it (sharding='auto')"


def _changes_that_fit(planner: Planner, leanest: Option, step: Step, excess: int) -> Iterator[str]:
    """Changes of the recipe, each of which alone makes one row fit. excess: bytes over the budget."""
    for name in CHECKPOINTING_BY_MEMORY:
        leaner, _ = planner.leanest(name, leanest.on_host)
        if leaner.peak < leanest.peak and planner.fits(leaner):
            yield f"checkpointing={name!r} ({leaner.peak / GIB:.1f} GiB)"
            break
    if seq_len := _shorter_row(planner, leanest):
        yield f"TrainSpec.seq_len={seq_len}"
    of_rank = sum(step.resident[kind] for kind in (ADAPTERS, GRADIENTS, OPTIMIZER))  # proportional to the rank
    rank = int(planner.recipe.lora.rank * (1 - excess / of_rank)) // 8 * 8
    if rank >= 8:
        yield f"LoraSpec.rank={rank}"


def _shorter_row(planner: Planner, leanest: Option) -> int:
    """Tokens of the longest row that fits and is shorter than the recipe's; 0 where none fits."""
    tokens = min(planner.longest_row(leanest.policy, leanest.on_host), planner.seq_len - 256)
    # Each is counted: the bytes of a row shorter than a tile of logits do not lie on the straight line.
    while tokens > 0:
        step = planner.forecast.step(tokens, leanest.policy, on_host=leanest.on_host)
        if step.peak() <= planner.card.budget:
            return tokens
        tokens -= 256
    return 0
