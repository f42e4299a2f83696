"""Chooses how a recipe's optimizer step runs on a card: the fastest micro-batch and the least recompute that fit.

Rows per optimizer step is the contract of a recipe: micro-batch rows x accumulation x processes always equals it.
What fits is counted (common.plan.forecast), not estimated; what is fastest follows from a simple model of time
(common.plan.step.Speed): every operator takes as long as its matmul or its memory traffic, whichever is longer, but no
less than launching it from Python, and copies to the host go on beside.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from common.machine.collectives import all_gather, broadcast_from_main
from common.machine.device import GIB, Machine, available_ram, require_gpu, this_machine, unusable_gpu
from common.machine.layout import ONE_PROCESS, Layout
from common.machine.processes import local_world_size, world_size
from common.model.activation_checkpointing import Policy
from common.model.attention import attention_implementation
from common.model.files import load_config
from common.model.sharding import refuse_unshardable
from common.plan.forecast import Forecast, Setting, speed_of
from common.plan.step import ADAPTERS, EMBEDDINGS, GATHERED, GRADIENTS, OPTIMIZER, WEIGHTS, Step, peak_between
from common.recipe import Checkpointing, Recipe, TrainSpec, UserError, rows_per_process

# What the count cannot see.
CONTEXT_BYTES = GIB // 2  # CUDA context and loaded kernels: about 0.5 GiB on the cards of this size; not measured by us
# cuBLAS takes 8 blocks of 4,096 KiB (CUBLAS_WORKSPACE_CONFIG, process_state.py), once for the forward and once for
# the backward thread, and cuBLASLt up to as much again (torch, ATen/cuda/CUDABlas.cpp).
WORKSPACE_BYTES = 3 * (32 << 20)
NCCL_BYTES = GIB // 4  # its buffers and kernels, on a card that talks to others; assumed, not measured
HOST_SHARE = 0.8  # of the available host memory: pinned blocks are powers of two, and the data needs some
RESERVE_SHARE = 0.03  # of the card: blocks that the allocator cannot use for their size, with expandable segments
LONGEST_MICRO_BATCH = 16_384  # tokens; past it nothing gets faster, so a plan looks no further
SAME_TIME, SAME_SENT = 1.02, 1.1  # what is this near to each other is taken for the same
LONG_ROW = 8_192  # tokens from which attention is a large enough part of a layer to be worth keeping
CHECKPOINTING_BY_MEMORY: tuple[Checkpointing, ...] = ("every layer", "offload")  # from fast to lean
TOKENS_PER_MICRO_BATCH_CPU = 1_024  # past this size the caches of a CPU are too small


@dataclass(frozen=True)
class Card:
    """The memory that a run may use."""

    name: str
    size: int  # bytes: of the card, or what is free of it
    context_is_there: bool = False  # this process has its CUDA context already
    gpu: str | None = None  # for its speed; None is an RTX 4090
    alone: bool = True  # else it talks to other cards
    host: int | None = None  # bytes of host memory that a run may use beside it; None where nobody knows

    @property
    def reserve(self) -> int:
        return int(RESERVE_SHARE * self.size)

    @property
    def nccl(self) -> int:
        return 0 if self.alone else NCCL_BYTES

    @property
    def unseen(self) -> int:
        """Bytes that no step can use."""
        return self.reserve + WORKSPACE_BYTES + self.nccl + (0 if self.context_is_there else CONTEXT_BYTES)

    @property
    def budget(self) -> int:
        return self.size - self.unseen

    @classmethod
    def of_size(cls, gib: float) -> "Card":
        return cls(f"a card of {gib:g} GiB", int(gib * GIB))

    @classmethod
    def of_machine(cls, machine: Machine) -> "Card":
        free = machine.free_bytes()
        host = available_ram()
        here = None if host is None else int(HOST_SHARE * host) // local_world_size()
        name = f"{free / GIB:.1f} GiB free on {machine.name}"
        return cls(name, free, context_is_there=True, gpu=machine.name, host=here)


@dataclass(frozen=True)
class Plan:
    """How one optimizer step runs."""

    micro_batch_rows: int
    accumulation: int
    layout: Layout
    checkpointing: Policy
    text: str  # for people
    peak_bytes: int | None = None  # predicted, as torch.cuda.max_memory_allocated counts; None on a CPU
    optimizer_bytes: int = 0  # of the optimizer's states

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_rows * self.accumulation * self.layout.processes


@dataclass(frozen=True)
class Option:
    """One way to run the step."""

    rows: int  # of a micro-batch
    policy: Policy
    peak: int  # bytes
    seconds_per_token: float
    on_host: int = 0  # layers whose parts wait in host memory
    host: int = 0  # bytes in host memory
    sent_per_token: float = 0.0  # bytes, to and from the host and from other cards


class Planner:
    """The options of one recipe on one card.

    Every allocation of a step is a straight line in the tokens of the micro-batch, so two counts tell all others. What
    is chosen is counted again as it is.
    """

    def __init__(
        self, recipe: Recipe, card: Card, setting: Setting | None = None, layout: Layout = ONE_PROCESS
    ) -> None:
        self.recipe, self.seq_len, self.layout = recipe, recipe.train.seq_len, layout
        self.card = replace(card, alone=layout.processes == 1)
        self.rows_here = rows_per_process(recipe.train, layout.processes)
        refuse_more_positions(recipe)
        self.forecast = Forecast(recipe, setting or Setting(), speed_of(card.gpu), layout)
        self.layers = self.forecast.layers
        # DistributedDataParallel sends gradients in buckets of its own: as much memory again as they take.
        self.buckets = 0
        if layout.processes > 1 and not layout.sharded:
            self.buckets = self.forecast.step(self.seq_len, Policy(self.layers)).base[ADAPTERS]
        self.counted_at = self.seq_len, max(LONGEST_MICRO_BATCH, 2 * self.seq_len)  # tokens

    def option(self, rows: int, policy: Policy, on_host: int = 0) -> Option:
        """Peak and time between those of the two counts."""
        tokens, (short, long) = rows * self.seq_len, self.counted_at
        first, second = (self.forecast.step(count, policy, on_host=on_host) for count in (short, long))
        share, speed = (tokens - short) / (long - short), self.forecast.speed
        seconds = first.seconds(speed) + share * (second.seconds(speed) - first.seconds(speed))
        host = int(first.host_peak() + share * (second.host_peak() - first.host_peak()))
        sent = first.sent() + share * (second.sent() - first.sent())
        return Option(rows, policy, self.peak(tokens, policy, on_host), seconds / tokens, on_host, host, sent / tokens)

    def peak(self, tokens: int, policy: Policy, on_host: int = 0) -> int:
        """Bytes at the worst moment of a micro-batch, from its two counts."""
        short, long = self.counted_at
        first, second = (self.forecast.step(count, policy, on_host=on_host) for count in (short, long))
        return peak_between(first, second, (tokens - short) / (long - short)) + self.buckets

    def exact(self, rows: int, policy: Policy, on_host: int = 0) -> tuple[Option, Step]:
        """The option counted as it is, and its step."""
        accumulates = rows < self.rows_here
        step = self.forecast.step(rows * self.seq_len, policy, accumulates=accumulates, on_host=on_host)
        tokens = rows * self.seq_len
        time = step.seconds(self.forecast.speed) / tokens
        peak = step.peak() + self.buckets
        return Option(rows, policy, peak, time, on_host, step.host_peak(), step.sent() / tokens), step

    def fits(self, option: Option) -> bool:
        return option.peak <= self.card.budget and (self.card.host is None or option.host <= self.card.host)

    def fastest(self, rows: int, on_host: int = 0, **extras: bool) -> Option | None:
        """The option that keeps the most layers; None where even recomputing every layer does not fit."""
        fewest = min(3, self.layers) if extras.get("offload") else 0  # that recompute
        low, high = 0, self.layers - fewest  # kept
        best = self.option(rows, Policy(self.layers, low, **extras), on_host)
        if not self.fits(best):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            option = self.option(rows, Policy(self.layers, middle, **extras), on_host)
            if self.fits(option):
                best, low = option, middle
            else:
                high = middle - 1
        return best

    def choose(self) -> Option:
        """The fastest option that fits, under the recipe's own policy if it names one.

        Raises UserError, with the arithmetic and the changes that would fit, when not even one row does.
        """
        wanted = self.recipe.train.checkpointing
        leanest = self.forecast.step(self.seq_len, Policy(self.layers), on_host=self._shares_on_host()[-1])
        if sum(leanest.base.values()) > self.card.budget:
            raise UserError(self._explain_misfit(wanted))
        found: list[Option | None] = []
        for rows, on_host in product(self._sizes(), self._shares_on_host()):
            if wanted != "auto":
                named = self.option(rows, Policy.named(wanted, self.layers), on_host)
                found.append(named if self.fits(named) else None)
                continue
            found.append(self.fastest(rows, on_host))
            if found[-1] is None or found[-1].policy.recomputed:
                found.append(self.fastest(rows, on_host, offload=True))
                if self.seq_len >= LONG_ROW:
                    found.append(self.fastest(rows, on_host, keep_attention=True))
        options = sorted((option for option in found if option), key=lambda option: option.seconds_per_token)
        if self.layout.sharded and options:  # of those that the model of time cannot tell apart, the least to send
            slower = SAME_TIME * options[0].seconds_per_token
            sent = {option: round(math.log(option.sent_per_token, SAME_SENT)) for option in options}
            options.sort(key=lambda o: (o.seconds_per_token > slower, sent[o], o.seconds_per_token))
        for option in options:
            exact, _ = self.exact(option.rows, option.policy, option.on_host)
            if self.fits(exact):
                return self._fewest_on_host(exact)
        raise UserError(self._explain_misfit(wanted))

    def _shares_on_host(self) -> list[int]:
        """How many layers may have their parts in host memory: eighths of them; `_fewest_on_host` then takes fewer."""
        if not self.layout.sharded:
            return [0]
        return sorted({self.layers * eighths // 8 for eighths in range(9)})

    def _fewest_on_host(self, option: Option) -> Option:
        low, high = 0, option.on_host
        while low < high:
            middle = (low + high) // 2
            fewer, _ = self.exact(option.rows, option.policy, middle)
            if self.fits(fewer):
                option, high = fewer, middle
            else:
                low = middle + 1
        return option

    def _sizes(self) -> Iterator[int]:
        here, most = self.rows_here, max(1, LONGEST_MICRO_BATCH // self.seq_len)
        return (rows for rows in range(1, here + 1) if here % rows == 0 and rows <= most)

    def longest_row(self, policy: Policy, on_host: int = 0) -> int:
        """Tokens of the longest single row that fits, a multiple of 256, whatever the model's positions; 0 for none."""
        low, high = 0, 1 << 13  # multiples of 256
        while low < high:
            middle = (low + high + 1) // 2
            if self.peak(256 * middle, policy, on_host) <= self.card.budget:
                low = middle
            else:
                high = middle - 1
        return 256 * low

    def _explain_misfit(self, wanted: Checkpointing) -> str:
        most = self._shares_on_host()[-1]
        leanest, step = self.exact(1, Policy.named("offload" if wanted == "auto" else wanted, self.layers), most)
        fixed, over = sum(step.base.values()), leanest.peak - self.card.budget
        message = (
            f"one row of {self.seq_len:,} tokens does not fit {self.card.name}{self._with_others()}: "
            f"{fixed / GIB:.1f} GiB for the model "
            f"and its adapters + {(leanest.peak - fixed) / GIB:.1f} GiB for the row is {over / GIB:.1f} GiB over the "
            f"budget of {max(0, self.card.budget) / GIB:.1f} GiB ({leanest.policy}). "
        )
        if over <= 0 and self.card.host is not None:
            return (
                f"the layers' parts and inputs do not fit the host memory: {leanest.host / GIB:.1f} GiB for each card, "
                f"and {self.card.host / GIB:.1f} GiB are available for it. Take more cards, or more host memory"
            )
        if step.base[WEIGHTS] + step.base[EMBEDDINGS] > self.card.budget:
            return message + f"The model alone is too large: take a smaller model, or {self._more_room()}"
        moves = list(self._moves(leanest, step, over))
        return message + ("What would fit: " + ", or ".join(moves) if moves else "Take a smaller model")

    def _with_others(self) -> str:
        """Of several cards, how they share the model."""
        if self.layout.processes == 1:
            return ""
        return f", {replace(self.layout, on_host=self.layers)}" if self.layout.sharded else f", {self.layout}"

    def _more_room(self) -> str:
        if self.layout.processes == 1:
            return "a larger card, or let several share it (make plan GPUS=2 shows what each would hold)"
        return "larger cards, or more of them" if self.layout.sharded else "let the cards share it (sharding='auto')"

    def _moves(self, leanest: Option, step: Step, over: int) -> Iterator[str]:
        """Changes of the recipe, each of which would make one row fit."""
        for name in CHECKPOINTING_BY_MEMORY:
            lean, _ = self.exact(1, Policy.named(name, self.layers), leanest.on_host)
            if lean.peak < leanest.peak and self.fits(lean):
                yield f"checkpointing={name!r} ({lean.peak / GIB:.1f} GiB)"
                break
        longest = min(self.longest_row(leanest.policy, leanest.on_host), self.seq_len - 256)
        while (
            longest > 0
            and self.forecast.step(longest, leanest.policy, on_host=leanest.on_host).peak() > self.card.budget
        ):
            longest -= 256  # a row shorter than a tile of logits is no straight line
        if longest > 0:
            yield f"TrainSpec.seq_len={longest}"
        adapters = sum(step.base[kind] for kind in (ADAPTERS, GRADIENTS, OPTIMIZER))
        rank = int(self.recipe.lora.rank * (1 - over / adapters)) // 8 * 8
        if rank >= 8:
            yield f"LoraSpec.rank={rank}"


def refuse_more_positions(recipe: Recipe) -> None:
    """Raises UserError when a row is longer than the model can tell positions apart."""
    seq_len = recipe.train.seq_len
    positions = getattr(load_config(recipe.model), "max_position_embeddings", seq_len)
    if seq_len > positions:
        raise UserError(f"TrainSpec.seq_len is {seq_len:,}; {recipe.model.name} has {positions:,} positions")


def plan_for_card(recipe: Recipe) -> Plan:
    """The plan for this machine's GPU, or for its CPU where the recipe allows that; prints it. Nothing is downloaded
    but, for a model that does not ship its config here, the config. For several GPUs it is that of the smallest.

    Raises UserError when the recipe needs a GPU that is not there, and when one row does not fit.
    """
    machine = this_machine()
    if recipe.card_gib is not None:
        require_gpu(recipe.model.name)
    print(f"machine: {machine}")
    if machine.is_gpu:
        plan = plan_on(recipe, smallest_of(all_gather((Card.of_machine(machine), machine.dtype))), setting_of(machine))
    else:
        if reason := unusable_gpu():
            print(f"warning: training on the CPU: {reason}")
        plan = _cpu_plan(recipe, machine)
    plan = broadcast_from_main(plan)  # what a process counts as its part may be a few bytes less than the first's
    print(plan.text)
    return plan


def smallest_of(cards: Sequence[tuple[Card, torch.dtype]]) -> Card:
    """The one with the least free memory, which all must do with. Raises UserError when they compute differently."""
    if len({dtype for _, dtype in cards}) > 1:
        kinds = ", ".join(f"{card.gpu} in {str(dtype).removeprefix('torch.')}" for card, dtype in cards)
        raise UserError(f"the GPUs do not compute in one number format: {kinds}. Leave out the ones without bf16")
    card, _ = min(cards, key=lambda pair: pair[0].size)
    if len({card.size >> 26 for card, _ in cards}) > 1:  # by more than 64 MiB
        card = replace(card, name=f"{card.name}, the smallest of {len(cards)} cards")
    return card


def setting_of(machine: Machine) -> Setting:
    return Setting(machine.dtype, attention_implementation(machine))


def plan_on(recipe: Recipe, card: Card, setting: Setting | None = None) -> Plan:
    """The plan for a card, which need not be there, in each process of this run. Raises UserError as plan_for_card."""
    return make_plan(*choose_option(recipe, card, setting, world_size()))


def choose_option(recipe: Recipe, card: Card, setting: Setting | None, processes: int) -> tuple[Planner, Option]:
    """The fastest option that fits: each card with the whole model, or else with a part of every layer.

    Raises UserError when one row does not fit, and where sharding is needed and the recipe asks for what cannot be.
    """
    sharding = recipe.train.sharding
    if processes == 1 or sharding != "always":
        planner = Planner(recipe, card, setting, Layout(processes))
        try:
            return planner, planner.choose()
        except UserError:
            if processes == 1 or sharding == "never":
                raise
    refuse_unshardable(recipe.lora, recipe.train)
    planner = Planner(recipe, card, setting, Layout(processes, sharded=True))
    return planner, planner.choose()


def fits_whole(recipe: Recipe, card: Card, processes: int) -> bool:
    """Whether each of so many cards of this size can have the whole model."""
    try:
        Planner(recipe, card, None, Layout(processes)).choose()
    except UserError:
        return False
    return True


def make_plan(planner: Planner, option: Option) -> Plan:
    """The option as a plan, in words."""
    train, card, policy = planner.recipe.train, planner.card, option.policy
    layout = replace(planner.layout, on_host=option.on_host)
    _, step = planner.exact(option.rows, policy, option.on_host)
    keep = "1 layer keeps its" if policy.kept == 1 else f"{policy.kept} layers keep their"
    kept = f"; {keep} activations" if policy.kept and policy.recomputed else ""
    each = " for each card" if layout.processes > 1 else ""
    host = f"; {step.host_peak() / GIB:.1f} GiB in host memory{each}" if step.host_peak() else ""
    why = (
        f"predicted peak {(option.peak + WORKSPACE_BYTES) / GIB:.1f} GiB allocated, "
        f"{(option.peak + card.unseen) / GIB:.1f} GiB of {card.name} with what a count cannot see{kept}{host}"
    )
    if layout.sharded:
        why += f"\n  {shares(step, layout)}"
    here, more = planner.rows_here, option.rows + 1
    if here % more and more < here and planner.fits(planner.option(more, policy, option.on_host)):
        why += f"\n  {more} rows at a time would fit too, but {here} rows cannot be split evenly into parts of {more}"
    return _worded_plan(train, layout, option.rows, policy, why, option.peak + WORKSPACE_BYTES, step.base[OPTIMIZER])


def shares(step: Step, layout: Layout) -> str:
    """What one of the cards that share a model holds, in words."""
    parts = (step.layers - layout.on_host) * sum(step.cut.values())
    gathered = max(now[GATHERED] for _, now in step.timeline())
    kept_whole = sum(step.base.values()) - step.base[GATHERED] - parts
    return (
        f"on each card {parts / GIB:.1f} GiB of parts (weights, adapters, gradients, optimizer), "
        f"{kept_whole / GIB:.1f} GiB whole (embedding, head, norm, scales), at most {gathered / GIB:.1f} GiB of layers "
        "gathered, the next one early"
    )


def _cpu_plan(recipe: Recipe, machine: Machine) -> Plan:
    refuse_more_positions(recipe)
    train, processes = recipe.train, world_size()
    layout = Layout(processes, sharded=processes > 1 and train.sharding == "always")
    if layout.sharded:
        refuse_unshardable(recipe.lora, train)
    layers = load_config(recipe.model).num_hidden_layers
    policy = Policy.named("none" if train.checkpointing == "auto" else train.checkpointing, layers)
    limit = max(1, TOKENS_PER_MICRO_BATCH_CPU // train.seq_len)
    here = rows_per_process(train, processes)
    rows = max(rows for rows in range(1, min(here, limit) + 1) if here % rows == 0)
    why = f"on a CPU at most {TOKENS_PER_MICRO_BATCH_CPU:,} tokens at a time ({machine.name})"
    return _worded_plan(train, layout, rows, policy, why)


def _worded_plan(
    train: TrainSpec,
    layout: Layout,
    rows: int,
    policy: Policy,
    why: str,
    peak_bytes: int | None = None,
    optimizer_bytes: int = 0,
) -> Plan:
    accumulation = rows_per_process(train, layout.processes) // rows
    micro_batches = "1 micro-batch" if accumulation == 1 else f"{accumulation} micro-batches"
    shared, how = "", ""
    if layout.processes > 1:
        shared, how = f" on each of {layout.processes} processes", f"\n  {layout}"
    text = (
        f"plan: {train.rows_per_step} rows of {train.seq_len:,} tokens per optimizer step: {micro_batches} of "
        f"{rows} {'row' if rows == 1 else 'rows'}{shared}; {policy}{how}\n  {why}"
    )
    return Plan(rows, accumulation, layout, policy, text, peak_bytes, optimizer_bytes)
