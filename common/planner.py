"""Chooses how a recipe's optimizer step runs on a card: the fastest micro-batch and the least recompute that fit.

Rows per optimizer step is the contract of a recipe: micro-batch rows x accumulation x processes always equals it.
What fits is counted (common.forecast), not estimated; what is fastest follows from a simple model of time
(common.step.Speed): every operator takes as long as its matmul or its memory traffic, whichever is longer, but no
less than launching it from Python, and copies to the host go on beside.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from common.activation_checkpointing import Policy
from common.attention import attention_implementation
from common.forecast import Forecast, Setting, speed_of
from common.machine import GIB, Machine, require_gpu, this_machine, unusable_gpu
from common.processes import Layout, world_size
from common.recipe import Checkpointing, Recipe, TrainSpec, UserError
from common.step import ADAPTERS, EMBEDDINGS, GRADIENTS, OPTIMIZER, WEIGHTS, Step, peak_between
from common.weights import load_config

# What the count cannot see.
CONTEXT_BYTES = GIB // 2  # CUDA context and loaded kernels: about 0.5 GiB on the cards of this size; not measured by us
# cuBLAS takes 8 blocks of 4,096 KiB (CUBLAS_WORKSPACE_CONFIG in common/__init__.py), once for the forward and once for
# the backward thread, and cuBLASLt up to as much again (torch, ATen/cuda/CUDABlas.cpp).
WORKSPACE_BYTES = 3 * (32 << 20)
RESERVE_SHARE = 0.03  # of the card: blocks that the allocator cannot use for their size, with expandable segments
LONGEST_MICRO_BATCH = 16_384  # tokens; past it nothing gets faster, so a plan looks no further
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

    @property
    def reserve(self) -> int:
        return int(RESERVE_SHARE * self.size)

    @property
    def unseen(self) -> int:
        """Bytes that no step can use."""
        return self.reserve + WORKSPACE_BYTES + (0 if self.context_is_there else CONTEXT_BYTES)

    @property
    def budget(self) -> int:
        return self.size - self.unseen

    @classmethod
    def of_size(cls, gib: float) -> "Card":
        return cls(f"a card of {gib:g} GiB", int(gib * GIB))

    @classmethod
    def of_machine(cls, machine: Machine) -> "Card":
        free = machine.free_bytes()
        return cls(f"{free / GIB:.1f} GiB free on {machine.name}", free, context_is_there=True, gpu=machine.name)


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


class Planner:
    """The options of one recipe on one card.

    Every allocation of a step is a straight line in the tokens of the micro-batch, so two counts tell all others. What
    is chosen is counted again as it is.
    """

    def __init__(self, recipe: Recipe, card: Card, setting: Setting | None = None) -> None:
        self.recipe, self.card, self.seq_len = recipe, card, recipe.train.seq_len
        refuse_more_positions(recipe)
        self.forecast = Forecast(recipe, setting or Setting(), speed_of(card.gpu))
        self.layers = self.forecast.layers
        # DistributedDataParallel sends gradients in buckets of its own: as much memory again as they take.
        self.buckets = 0
        if world_size() > 1:
            self.buckets = self.forecast.step(self.seq_len, Policy(self.layers)).base[ADAPTERS]
        self.counted_at = self.seq_len, max(LONGEST_MICRO_BATCH, 2 * self.seq_len)  # tokens

    def option(self, rows: int, policy: Policy) -> Option:
        """Peak and time between those of the two counts."""
        tokens, (short, long) = rows * self.seq_len, self.counted_at
        first, second = (self.forecast.step(count, policy).seconds(self.forecast.speed) for count in (short, long))
        seconds = first + (tokens - short) / (long - short) * (second - first)
        return Option(rows, policy, self.peak(tokens, policy), seconds / tokens)

    def peak(self, tokens: int, policy: Policy) -> int:
        """Bytes at the worst moment of a micro-batch, from its two counts."""
        short, long = self.counted_at
        first, second = (self.forecast.step(count, policy) for count in (short, long))
        return peak_between(first, second, (tokens - short) / (long - short)) + self.buckets

    def exact(self, rows: int, policy: Policy) -> tuple[Option, Step]:
        """The option counted as it is, and its step."""
        accumulates = rows < rows_per_process(self.recipe.train)
        step = self.forecast.step(rows * self.seq_len, policy, accumulates=accumulates)
        time = step.seconds(self.forecast.speed) / (rows * self.seq_len)
        return Option(rows, policy, step.peak() + self.buckets, time), step

    def fits(self, option: Option) -> bool:
        return option.peak <= self.card.budget

    def fastest(self, rows: int, **extras: bool) -> Option | None:
        """The option that keeps the most layers; None where even recomputing every layer does not fit."""
        fewest = min(3, self.layers) if extras.get("offload") else 0  # that recompute
        low, high = 0, self.layers - fewest  # kept
        best = self.option(rows, Policy(self.layers, low, **extras))
        if not self.fits(best):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            option = self.option(rows, Policy(self.layers, middle, **extras))
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
        found: list[Option | None] = []
        for rows in self._sizes():
            if wanted != "auto":
                named = self.option(rows, Policy.named(wanted, self.layers))
                found.append(named if self.fits(named) else None)
                continue
            found.append(self.fastest(rows))
            if found[-1] is None or found[-1].policy.recomputed:
                found.append(self.fastest(rows, offload=True))
                if self.seq_len >= LONG_ROW:
                    found.append(self.fastest(rows, keep_attention=True))
        options = sorted((option for option in found if option), key=lambda option: option.seconds_per_token)
        for option in options:
            exact, _ = self.exact(option.rows, option.policy)
            if self.fits(exact):
                return exact
        raise UserError(self._explain_misfit(wanted))

    def _sizes(self) -> Iterator[int]:
        here = rows_per_process(self.recipe.train)
        most = max(1, LONGEST_MICRO_BATCH // self.seq_len)
        return (rows for rows in range(1, here + 1) if here % rows == 0 and rows <= most)

    def longest_row(self, policy: Policy) -> int:
        """Tokens of the longest single row that fits, a multiple of 256, whatever the model's positions; 0 for none."""
        low, high = 0, 1 << 13  # multiples of 256
        while low < high:
            middle = (low + high + 1) // 2
            if self.peak(256 * middle, policy) <= self.card.budget:
                low = middle
            else:
                high = middle - 1
        return 256 * low

    def _explain_misfit(self, wanted: Checkpointing) -> str:
        leanest, step = self.exact(1, Policy.named("offload" if wanted == "auto" else wanted, self.layers))
        fixed, over = sum(step.base.values()), leanest.peak - self.card.budget
        message = (
            f"one row of {self.seq_len:,} tokens does not fit {self.card.name}: {fixed / GIB:.1f} GiB for the model "
            f"and its adapters + {(leanest.peak - fixed) / GIB:.1f} GiB for the row is {over / GIB:.1f} GiB over the "
            f"budget of {max(0, self.card.budget) / GIB:.1f} GiB ({leanest.policy}). "
        )
        if step.base[WEIGHTS] + step.base[EMBEDDINGS] > self.card.budget:
            return message + "The model alone is too large: take a smaller model, or a larger card"
        moves = list(self._moves(leanest, step, over))
        return message + ("What would fit: " + ", or ".join(moves) if moves else "Take a smaller model")

    def _moves(self, leanest: Option, step: Step, over: int) -> Iterator[str]:
        """Changes of the recipe, each of which would make one row fit."""
        for name in CHECKPOINTING_BY_MEMORY:
            lean, _ = self.exact(1, Policy.named(name, self.layers))
            if lean.peak < leanest.peak and self.fits(lean):
                yield f"checkpointing={name!r} ({lean.peak / GIB:.1f} GiB)"
                break
        longest = min(self.longest_row(leanest.policy), self.seq_len - 256)
        while longest > 0 and self.forecast.step(longest, leanest.policy).peak() > self.card.budget:
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
    but, for a model that does not ship its config here, the config.

    Raises UserError when the recipe needs a GPU that is not there, and when one row does not fit.
    """
    machine = this_machine()
    if recipe.card_gib is not None:
        require_gpu(recipe.model.name)
    print(f"machine: {machine}")
    if machine.is_gpu:
        plan = plan_on(recipe, Card.of_machine(machine), setting_of(machine))
    else:
        if reason := unusable_gpu():
            print(f"warning: training on the CPU: {reason}")
        plan = _cpu_plan(recipe, machine)
    print(plan.text)
    return plan


def setting_of(machine: Machine) -> Setting:
    return Setting(machine.dtype, attention_implementation(machine))


def plan_on(recipe: Recipe, card: Card, setting: Setting | None = None) -> Plan:
    """The plan for a card, which need not be there. Raises UserError as plan_for_card."""
    planner = Planner(recipe, card, setting)
    return planned(planner, planner.choose())


def planned(planner: Planner, option: Option) -> Plan:
    """The option as a plan, in words."""
    train, card, policy = planner.recipe.train, planner.card, option.policy
    _, step = planner.exact(option.rows, policy)
    kept = f"; {policy.kept} layers keep their activations" if policy.kept and policy.recomputed else ""
    host = f"; {step.host_peak() / GIB:.1f} GiB in host memory" if policy.offload and policy.recomputed else ""
    why = (
        f"predicted peak {(option.peak + WORKSPACE_BYTES) / GIB:.1f} GiB allocated, "
        f"{(option.peak + card.unseen) / GIB:.1f} GiB of {card.name} with what a count cannot see{kept}{host}"
    )
    here, more = rows_per_process(train), option.rows + 1
    if here % more and more < here and planner.fits(planner.option(more, policy)):
        why += f"\n  {more} rows at a time would fit too, but {here} rows cannot be split evenly into parts of {more}"
    return _plan(train, option.rows, policy, why, option.peak + WORKSPACE_BYTES, step.base[OPTIMIZER])


def _cpu_plan(recipe: Recipe, machine: Machine) -> Plan:
    refuse_more_positions(recipe)
    train = recipe.train
    layers = load_config(recipe.model).num_hidden_layers
    policy = Policy.named("none" if train.checkpointing == "auto" else train.checkpointing, layers)
    limit = max(1, TOKENS_PER_MICRO_BATCH_CPU // train.seq_len)
    here = rows_per_process(train)
    rows = max(rows for rows in range(1, min(here, limit) + 1) if here % rows == 0)
    return _plan(
        train, rows, policy, f"on a CPU at most {TOKENS_PER_MICRO_BATCH_CPU:,} tokens at a time ({machine.name})"
    )


def rows_per_process(train: TrainSpec) -> int:
    """Rows of an optimizer step that each process trains. Raises UserError when they cannot be shared out."""
    if train.rows_per_step % world_size():
        raise UserError(
            f"TrainSpec.rows_per_step is {train.rows_per_step}, which {world_size()} processes cannot share evenly: "
            f"take another number of GPUs, or a multiple of {world_size()}"
        )
    return train.rows_per_step // world_size()


def _plan(
    train: TrainSpec, rows: int, policy: Policy, why: str, peak_bytes: int | None = None, optimizer_bytes: int = 0
) -> Plan:
    accumulation = rows_per_process(train) // rows
    micro_batches = "1 micro-batch" if accumulation == 1 else f"{accumulation} micro-batches"
    shared = f" on each of {world_size()} processes" if world_size() > 1 else ""
    text = (
        f"plan: {train.rows_per_step} rows of {train.seq_len:,} tokens per optimizer step: {micro_batches} of "
        f"{rows} {'row' if rows == 1 else 'rows'}{shared}; {policy}\n  {why}"
    )
    layout = Layout(world_size(), sharded=world_size() > 1 and train.sharding == "always")
    return Plan(rows, accumulation, layout, policy, text, peak_bytes, optimizer_bytes)
