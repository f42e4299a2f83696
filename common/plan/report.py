"""The report of a plan in words, before anything is downloaded: the choice beside the three plain policies."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from common.machine.device import GIB
from common.model.activation_checkpointing import Policy
from common.model.config import load_config
from common.model.rope_scaling import usable_positions
from common.plan.card import Card
from common.plan.plan import Plan, make_plan
from common.plan.planner import Option, Planner
from common.plan.speed import Speed
from common.plan.step import GATHERED, KINDS, WEIGHTS, Step
from common.recipe import Recipe

OVERHEAD = "context and reserve"  # Card.overhead: what no step can use
# Names of the rows of the report.
NO_CHECKPOINTING, EVERY_LAYER, OFFLOAD, CHOICE = (
    "no checkpointing",
    "every layer",
    "every layer + boundaries on the host",
    "our choice",
)
# Ways to compute a long row beside the first ones, each the leanest of its kind (common.plan.planner.TILES).
IN_TILES, BY_HEAD, QKV_AGAIN = WAYS_IN_TILES = (
    "the same in tiles",
    "in tiles, by head",
    "in tiles, by head, q, k, v again",
)
TEXT_WIDTH, LABEL_WIDTH, COLUMN_WIDTH = 120, 38, 20  # characters


@dataclass(frozen=True)
class PolicyRow:
    """One way to run the step: what it takes, and how long."""

    name: str
    policy: Policy
    step: Step
    parts: dict[str, int]  # bytes at the worst moment by kind, and OVERHEAD; together the peak on the card
    seconds_per_token: float  # modelled
    relative_time: float  # per token; 1 is no checkpointing
    fits: bool
    streamed: int = 0  # layers whose weights wait in host memory
    embedding_on_host: bool = False

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class PlanReport:
    recipe: Recipe
    card: Card
    speed: Speed
    plan: Plan
    rows: tuple[PolicyRow, ...]  # NO_CHECKPOINTING, EVERY_LAYER, OFFLOAD, CHOICE
    longest: dict[str, int]  # tokens of the longest single row that fits, by name of the way
    host_of_longest: dict[str, int]  # bytes of host memory that it takes, by name of the way
    positions: int  # of the model

    def row(self, name: str) -> PolicyRow:
        return next(row for row in self.rows if row.name == name)

    def text(self) -> str:
        """The whole report, at most TEXT_WIDTH characters wide."""
        lines = [*self.plan.text.splitlines(), self._why(), self._times(), "", *self._table(), "", self._budget(), ""]
        return "\n".join([*(part for line in lines for part in _wrap(line)), *self._longest_rows()])

    def _why(self) -> str:
        wanted, free = self.recipe.train.checkpointing, self.row(NO_CHECKPOINTING)
        if wanted != "auto":
            return (
                f"why: the recipe asks for checkpointing={wanted!r}; of the micro-batches that fit, this is the fastest"
            )
        if not self.plan.checkpointing.recomputed:
            return "why: the fastest that fits; no layer needs to recompute"
        leanest = self.row(OFFLOAD)
        if self.plan.layout.waits and not leanest.fits:
            over = f"the leanest policy of those below would be {room_on(self.card, leanest)}"
            return f"why: the fastest that fits; with all weights on the card {over}"
        over = f"; without checkpointing it would be {room_on(self.card, free)}" if not free.fits else ""
        least = ", and of about as fast ones it sends the least between cards and host" * self.plan.layout.sharded
        return f"why: the fastest that fits{least}{over}"

    def _times(self) -> str:
        speed = self.speed
        assumed = "" if self.card.gpu and speed.name in self.card.gpu else " assumed"
        matmul, memory = speed.matmul_efficiency, speed.memory_efficiency
        return (
            f"times are modelled, not measured: {speed.name}{assumed}, "
            f"{_share(matmul)}{speed.flops_per_second / 1e12:,.0f} TFLOP/s, "
            f"memory {_share(memory)}{speed.memory_bytes_per_second / GIB:,.0f} GiB/s, "
            f"host link {speed.link_bytes_per_second / GIB:.0f} GiB/s, {speed.launch_seconds * 1e6:.0f} µs a launch"
        )

    def _table(self) -> list[str]:
        names = [textwrap.wrap(row.name, COLUMN_WIDTH - 4) for row in self.rows]
        heights = max(map(len, names))
        heads = [["", *line] for line in zip(*([""] * (heights - len(name)) + name for name in names), strict=True)]
        heads[-1][0] = "GiB at the worst moment"
        rule = "─" * (LABEL_WIDTH + COLUMN_WIDTH * len(self.rows))
        lines = [*(_line(*head) for head in heads), rule]
        shared = self.plan.layout.sharded
        for kind in (*KINDS, OVERHEAD):
            if kind == GATHERED and not shared:
                continue
            lines.append(_line(label_of(kind, self.recipe), *(_gib(row.parts[kind]) for row in self.rows)))
        lines += [rule, _line(f"peak on {self.card.name}", *(_gib(row.peak) for row in self.rows))]
        lines.append(_line("fits", *(f"{'yes' if row.fits else 'no'}, {room_on(self.card, row)}" for row in self.rows)))
        lines.append(
            _line("layers that recompute", *(f"{r.policy.recomputed} of {r.policy.layers}" for r in self.rows))
        )
        if any(row.streamed for row in self.rows):
            streamed = (f"{row.streamed} of {row.policy.layers}" for row in self.rows)
            lines.append(_line("layers whose weights stream", *streamed))
        if any(row.embedding_on_host for row in self.rows):
            places = ("host memory" if row.embedding_on_host else "card" for row in self.rows)
            lines.append(_line("the embedding lies in", *places))
        lines.append(_line("host memory, GiB", *(_gib(row.step.host_peak()) for row in self.rows)))
        lines.append(_line("time per token, 1 = no checkpointing", *(f"{row.relative_time:.2f} " for row in self.rows)))
        return [line.rstrip() for line in lines]

    def _budget(self) -> str:
        minus = "".join(f" - {size / GIB:.2f} {name}" for name, size in self.card.overhead().items() if size)
        return f"budget: {self.card.size / GIB:.2f} GiB{minus} = {self.card.budget / GIB:.2f} GiB for the step"

    def _longest_rows(self) -> Iterator[str]:
        of_model = f" (the model has {self.positions:,} positions)"
        row = "pair of answers, both with their prompt," if self.recipe.data.kind == "pairs" else "row"
        stream = f" with {waits} in host memory" if (waits := self.plan.layout.waits) else ""
        alone = ", as one example" * (self.plan.examples_per_row is not None and self.recipe.data.kind != "pairs")
        yield from _wrap(f"longest {row} that fits, in a micro-batch of 1 row{alone}{stream}{of_model}:")
        for name, tokens in self.longest.items():
            longer = ", more than the model's positions" if tokens > self.positions else ""
            amount = f"{tokens:>9,} tokens" if tokens else "     none"
            host = self.host_of_longest.get(name, 0)
            waits = f", {host / GIB:.1f} GiB in host memory" if tokens and host else ""
            yield f"  {name:<{LABEL_WIDTH}}{amount}{waits}{longer}"


def build_report(planner: Planner, option: Option) -> PlanReport:
    """The option beside the three plain ways to run micro-batches of as many rows."""
    layers, card = planner.layers, planner.card
    planner = planner.with_embedding(on_host=option.embedding_on_host)
    policies = {
        NO_CHECKPOINTING: Policy.named("none", layers),
        EVERY_LAYER: Policy.named("every layer", layers),
        OFFLOAD: Policy.named("offload", layers),
        CHOICE: option.policy,
    }
    # Where weights wait in host memory, the plain policies have all of them on the card: what it would be without.
    on_host, planners = dict.fromkeys(policies, option.on_host), dict.fromkeys(policies, planner)
    if not planner.layout.sharded:
        plain_ways = (NO_CHECKPOINTING, EVERY_LAYER, OFFLOAD)
        on_host |= dict.fromkeys(plain_ways, 0)
        planners |= dict.fromkeys(plain_ways, planner.with_embedding(on_host=False))
    counted = {name: planners[name].exact(option.rows, policy, on_host[name]) for name, policy in policies.items()}
    plain = counted[NO_CHECKPOINTING][0].seconds_per_token
    rows = tuple(
        PolicyRow(
            name,
            policies[name],
            step,
            step.at_peak() | {OVERHEAD: card.overhead_bytes},
            exact.seconds_per_token,
            exact.seconds_per_token / plain,
            planner.fits(exact),
            planner.layout.streams(exact.on_host) * exact.on_host,
            exact.embedding_on_host,
        )
        for name, (exact, step) in counted.items()
    )
    rows_of = {name: planner.longest_option(policies[name], option.on_host) for name in (EVERY_LAYER, OFFLOAD)}
    positions = usable_positions(load_config(planner.recipe.model))
    in_tiles = planner.policies_in_tiles("offload")
    if in_tiles and rows_of[OFFLOAD][0] < positions:  # else it is six counts that nobody needs
        leanest = {way_in_tiles(policy): policy for policy in in_tiles}
        rows_of |= {name: planner.longest_option(policy, option.on_host) for name, policy in leanest.items()}
    return PlanReport(
        planner.recipe,
        planner.card,
        planner.forecast.speed,
        make_plan(planner, option),
        rows,
        {name: tokens for name, (tokens, _) in rows_of.items()},
        {name: longest.host_bytes for name, (_, longest) in rows_of.items()},
        positions,
    )


def way_in_tiles(policy: Policy) -> str:
    """The name of the way in which the policy computes a long row."""
    return QKV_AGAIN if policy.qkv_again else BY_HEAD if policy.by_head else IN_TILES


def _share(efficiency: float) -> str:
    return "" if efficiency == 1 else f"{efficiency:.0%} of "


def label_of(kind: str, recipe: Recipe) -> str:
    return f"{'4-bit' if recipe.model.bits == 4 else '16-bit'} weights" if kind == WEIGHTS else kind


def room_on(card: Card, row: PolicyRow) -> str:
    room = (card.size - row.peak) / GIB
    return f"{room:.1f} GiB free" if row.fits else f"{-room:.1f} GiB over"


def _gib(size: int) -> str:
    """One decimal, two below 1 GiB, so that the points stand below each other."""
    if not size:
        return "-  "
    return f"{size / GIB:.2f}" if size < GIB else f"{size / GIB:.1f} "


def _line(label: str, *cells: str) -> str:
    return f"{label:<{LABEL_WIDTH}}" + "".join(f"{cell:>{COLUMN_WIDTH}}" for cell in cells)


def _wrap(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, TEXT_WIDTH, subsequent_indent=indent) or [""]
