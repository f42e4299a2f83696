"""What a user reads when nothing fits: the arithmetic, and the changes of the recipe that would fit."""

from collections.abc import Iterator
from dataclasses import replace

from common.machine.device import GIB
from common.model.activation_checkpointing import Policy
from common.plan.forecast import assumed_examples
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
    wanted, card, most = planner.recipe.train.checkpointing, planner.card, planner.offload_choices()[-1]
    planner = planner.leaner() if most else planner
    leanest, step = planner.leanest(wanted, most)
    excess = leanest.peak - card.budget
    if excess <= 0 and card.host_bytes is not None:
        if planner.layout.streams(leanest.on_host):
            return _too_little_host_memory(planner, leanest, card.host_bytes)
        return (
            f"the layers' parts and inputs do not fit the host memory: {leanest.host_bytes / GIB:.1f} GiB for each "
            f"card, and {card.host_bytes / GIB:.1f} GiB are available for it. "
            "Take shorter rows, more cards, or more host memory"
        )
    arithmetic = _arithmetic(planner, leanest, sum(step.resident.values()))
    if step.resident[WEIGHTS] + step.resident[EMBEDDINGS] > card.budget:
        streaming = "".join(f". What would fit: {change}" for change in _streaming_that_fits(planner, leanest.policy))
        return arithmetic + f"The model alone is too large: take a smaller model, or {_more_memory(planner)}{streaming}"
    changes = list(_changes_that_fit(planner, leanest, step, excess))
    none = f"Take a smaller model, or {_more_memory(planner)}"
    return arithmetic + ("What would fit: " + ", or ".join(changes) if changes else none)


def explain_examples(planner: Planner, planned: int, on_host: int) -> str:
    """One line: a row of the data has more examples than the `planned` ones, and so takes more than there is."""
    leanest, _ = planner.leanest(planner.recipe.train.checkpointing, on_host)
    examples, budget = planner.forecast.examples_per_row, planner.card.budget
    return (
        f"a row of the data has {examples:,} examples, and {planned:,} were planned: attention takes memory for each. "
        f"One row then takes {leanest.peak / GIB:.1f} GiB, the budget is {budget / GIB:.1f} GiB ({leanest.policy}). "
        "Lower TrainSpec.seq_len: a shorter row holds fewer examples"
    )


def _too_little_host_memory(planner: Planner, leanest: Option, available: int) -> str:
    """What the weights of all layers need of it, and which card would do with as many layers there as have room."""
    waits = replace(planner.layout, on_host=leanest.on_host).waits
    message = (
        f"{waits} and the layers' inputs do not fit the host memory: "
        f"{leanest.host_bytes / GIB:.1f} GiB for each card, and {available / GIB:.1f} GiB are available for it. "
    )
    is_free = planner.recipe.train.embedding_on_host is not True
    places = [planner, planner.with_embedding(on_host=False)] if is_free else [planner]
    fewer = [place.exact(1, leanest.policy, count)[0] for place in places for count in range(leanest.on_host)]
    most = min((option for option in fewer if option.host_bytes <= available), key=lambda o: o.peak, default=None)
    if most is None:
        return message + "Take a smaller model, or more host memory"
    needed = (most.peak + planner.card.overhead_bytes) / GIB
    return message + (
        f"Take more host memory, or a card of {needed:.1f} GiB, which needs {most.host_bytes / GIB:.1f} GiB there"
    )


def _streaming_that_fits(planner: Planner, policy: Policy) -> Iterator[str]:
    """The fields of TrainSpec that keep weights on the card, where with "auto" one row would fit."""
    train = planner.recipe.train
    if planner.layout.sharded:
        return
    if train.weights_on_host != "auto":
        streamed, _ = planner.leaner().exact(1, policy, planner.layers)
        yield from _words_if_it_fits(planner, "weights_on_host", streamed)
    if train.embedding_on_host is False and not planner.is_tied and train.weights_on_host != 0:
        elsewhere, _ = planner.with_embedding(on_host=True).exact(1, policy, planner.offload_choices()[-1])
        yield from _words_if_it_fits(planner, "embedding_on_host", elsewhere)


def _words_if_it_fits(planner: Planner, field: str, option: Option) -> Iterator[str]:
    if planner.fits(option):
        host = option.host_bytes / GIB
        yield f"TrainSpec.{field}='auto' ({option.peak / GIB:.1f} GiB, and {host:.1f} GiB of host memory)"


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
    yield from _streaming_that_fits(planner, leanest.policy)
    for name in CHECKPOINTING_BY_MEMORY:
        leaner, _ = planner.leanest(name, leanest.on_host)
        if leaner.peak < leanest.peak and planner.fits(leaner):
            yield f"checkpointing={name!r} ({leaner.peak / GIB:.1f} GiB)"
            break
    yield from _smaller_states_that_fit(planner, leanest)
    if seq_len := _shorter_row(planner, leanest):
        yield f"TrainSpec.seq_len={seq_len}"
    of_rank = sum(step.resident[kind] for kind in (ADAPTERS, GRADIENTS, OPTIMIZER))  # proportional to the rank
    rank = int(planner.recipe.lora.rank * (1 - excess / of_rank)) // 8 * 8
    if rank >= 8:
        yield f"LoraSpec.rank={rank}"


def _smaller_states_that_fit(planner: Planner, leanest: Option) -> Iterator[str]:
    """8-bit states of the optimizer, where the recipe has others."""
    recipe = planner.recipe
    if planner.layout.sharded or recipe.train.optimizer != "adamw_torch_fused":
        return
    smaller = replace(recipe, train=replace(recipe.train, optimizer="adamw_8bit"))
    other = Planner(smaller, planner.card, planner.forecast.setting, planner.layout)
    option, _ = other.exact(1, leanest.policy, leanest.on_host)
    if other.fits(option):
        yield f"TrainSpec.optimizer='adamw_8bit' ({option.peak / GIB:.1f} GiB)"


def _shorter_row(planner: Planner, leanest: Option) -> int:
    """Tokens of the longest row that fits and is shorter than the recipe's; 0 where none fits."""
    known = planner.forecast.setting.examples_per_row  # in each row, however short; None before there are data
    tokens = min(planner.longest_row(leanest.policy, leanest.on_host, known), planner.seq_len - 256)
    # Each is counted: the bytes of a row shorter than a tile of logits do not lie on the straight line.
    while tokens > 0:
        examples = known or assumed_examples(planner.recipe, tokens)
        step = planner.forecast.step(tokens, leanest.policy, examples=examples, on_host=leanest.on_host)
        if step.peak() <= planner.card.budget:
            return tokens
        tokens -= 256
    return 0
