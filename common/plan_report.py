"""A plan for people (text and a picture) and for machines (JSON), before anything is downloaded."""

import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.activation_checkpointing import Policy
from common.machine import GIB
from common.planner import WORKSPACE_BYTES, Card, Option, Plan, Planner, planned
from common.recipe import Recipe, UserError
from common.step import KINDS, WEIGHTS, Speed, Step
from common.weights import load_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNSEEN = "context and reserve"  # Card.unseen: what no step can use
NONE, EVERY_LAYER, OFFLOAD, CHOICE = (
    "no checkpointing",
    "every layer",
    "every layer + boundaries on the host",
    "our choice",
)
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
TEXT_WIDTH, LABEL_WIDTH, COLUMN_WIDTH = 120, 38, 20  # characters
POINTS = 2000  # of a curve; more than the picture has pixels
# Okabe and Ito's colours (jfly.uni-koeln.de/color), which stay apart for colour-blind readers; in the order of KINDS.
COLOURS = ("#0072B2", "#56B4E9", "#CC79A7", "#F0E442", "#E69F00", "#009E73", "#D55E00")


@dataclass(frozen=True)
class Row:
    """One way to run the step: what it takes, and how long."""

    name: str
    policy: Policy
    step: Step
    parts: dict[str, int]  # bytes at the worst moment by kind, and UNSEEN; together the peak on the card
    seconds_per_token: float  # modelled
    relative_time: float  # per token; 1 is no checkpointing
    fits: bool

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Report:
    recipe: Recipe
    card: Card
    speed: Speed
    plan: Plan
    rows: tuple[Row, ...]  # NONE, EVERY_LAYER, OFFLOAD, CHOICE
    longest: dict[str, int]  # tokens of the longest single row that fits, by name of the row
    positions: int | None  # of the model

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def text(self) -> str:
        """The whole report, at most TEXT_WIDTH characters wide."""
        lines = [*self.plan.text.splitlines(), self._why(), self._times(), "", *self._table(), "", self._budget(), ""]
        return "\n".join([*(part for line in lines for part in _wrap(line)), *self._longest_rows()])

    def _why(self) -> str:
        wanted, free = self.recipe.train.checkpointing, self.row(NONE)
        if wanted != "auto":
            return (
                f"why: the recipe asks for checkpointing={wanted!r}; of the micro-batches that fit, this is the fastest"
            )
        if not self.plan.checkpointing.recomputed:
            return "why: the fastest that fits; no layer needs to recompute"
        over = f"; without checkpointing it would be {_room(self.card, free)}" if not free.fits else ""
        return f"why: the fastest that fits{over}"

    def _times(self) -> str:
        speed = self.speed
        assumed = "" if self.card.gpu and speed.name in self.card.gpu else " assumed"
        return (
            f"times are modelled, not measured: {speed.name}{assumed}, {speed.flops / 1e12:,.0f} TFLOP/s, memory "
            f"{speed.bandwidth / GIB:,.0f} GiB/s, host link {speed.host_link / GIB:.0f} GiB/s, "
            f"{speed.launch * 1e6:.0f} µs a launch"
        )

    def _table(self) -> list[str]:
        names = [textwrap.wrap(row.name, COLUMN_WIDTH - 4) for row in self.rows]
        heights = max(map(len, names))
        heads = [["", *line] for line in zip(*([""] * (heights - len(name)) + name for name in names), strict=True)]
        heads[-1][0] = "GiB at the worst moment"
        rule = "─" * (LABEL_WIDTH + COLUMN_WIDTH * len(self.rows))
        lines = [*(_line(*head) for head in heads), rule]
        for kind in (*KINDS, UNSEEN):
            lines.append(_line(_label(kind, self.recipe), *(_gib(row.parts[kind]) for row in self.rows)))
        lines += [rule, _line(f"peak on {self.card.name}", *(_gib(row.peak) for row in self.rows))]
        lines.append(_line("fits", *(f"{'yes' if row.fits else 'no'}, {_room(self.card, row)}" for row in self.rows)))
        lines.append(
            _line("layers that recompute", *(f"{r.policy.recomputed} of {r.policy.layers}" for r in self.rows))
        )
        lines.append(_line("host memory, GiB", *(_gib(row.step.host_peak()) for row in self.rows)))
        lines.append(_line("time per token, 1 = no checkpointing", *(f"{row.relative_time:.2f} " for row in self.rows)))
        return [line.rstrip() for line in lines]

    def _budget(self) -> str:
        minus = "".join(f" - {size / GIB:.2f} {name}" for name, size in unseen_parts(self.card).items() if size)
        return f"budget: {self.card.size / GIB:.2f} GiB{minus} = {self.card.budget / GIB:.2f} GiB for the step"

    def _longest_rows(self) -> Iterator[str]:
        of_model = f" (the model has {self.positions:,} positions)" if self.positions else ""
        yield f"longest row that fits, in a micro-batch of 1 row{of_model}:"
        for name, tokens in self.longest.items():
            longer = ", more than the model's positions" if self.positions and tokens > self.positions else ""
            amount = f"{tokens:>7,} tokens" if tokens else "   none"
            yield f"  {name:<{LABEL_WIDTH}}{amount}{longer}"


def report(planner: Planner, option: Option) -> Report:
    """The option beside the three plain ways to run micro-batches of as many rows."""
    layers, card = planner.layers, planner.card
    policies = {
        NONE: Policy.named("none", layers),
        EVERY_LAYER: Policy.named("every layer", layers),
        OFFLOAD: Policy.named("offload", layers),
        CHOICE: option.policy,
    }
    counted = {name: planner.exact(option.rows, policy) for name, policy in policies.items()}
    plain = counted[NONE][0].seconds_per_token
    rows = tuple(
        Row(
            name,
            policies[name],
            step,
            step.at_peak() | {UNSEEN: card.unseen},
            exact.seconds_per_token,
            exact.seconds_per_token / plain,
            planner.fits(exact),
        )
        for name, (exact, step) in counted.items()
    )
    longest = {name: planner.longest_row(policies[name]) for name in (EVERY_LAYER, OFFLOAD)}
    positions = getattr(load_config(planner.recipe.model), "max_position_embeddings", None)
    return Report(planner.recipe, card, planner.forecast.speed, planned(planner, option), rows, longest, positions)


def unseen_parts(card: Card) -> dict[str, int]:
    """Card.unseen by name, in bytes."""
    context = card.unseen - WORKSPACE_BYTES - card.reserve
    return {"CUDA context": context, "workspaces": WORKSPACE_BYTES, "reserve": card.reserve}


def write_json(report: Report, path: Path) -> None:
    """The report for machines. Raises UserError where it cannot be written."""
    with _writing(path):
        path.write_text(json.dumps(_values(report), indent=2) + "\n", encoding="utf-8")


def _values(report: Report) -> dict[str, Any]:
    card, plan, speed = report.card, report.plan, report.speed
    return {
        "recipe": asdict(report.recipe),
        "card": {
            "name": card.name,
            "size_bytes": card.size,
            "reserve_bytes": card.reserve,
            "unseen_bytes": {_key(name): size for name, size in unseen_parts(card).items()},
            "budget_bytes": card.budget,
        },
        "choice": {
            "micro_batch_rows": plan.micro_batch_rows,
            "accumulation": plan.accumulation,
            "processes": plan.processes,
            **_policy_values(plan.checkpointing),
            "predicted_peak_allocated_bytes": plan.peak_bytes,
            "predicted_peak_on_card_bytes": report.row(CHOICE).peak,
        },
        "table": [
            {
                "name": row.name,
                **_policy_values(row.policy),
                "peak_on_card_bytes": row.peak,
                "parts_bytes": {_key(kind): size for kind, size in row.parts.items()},
                "fits": row.fits,
                "host_memory_bytes": row.step.host_peak(),
                "seconds_per_token": row.seconds_per_token,
                "relative_time_per_token": row.relative_time,
            }
            for row in report.rows
        ],
        "longest_rows": [{"name": name, "tokens": tokens} for name, tokens in report.longest.items()],
        "model_positions_tokens": report.positions,
        "speed": {
            "name": speed.name,
            "matmul_flop_per_second": speed.flops,
            "memory_bytes_per_second": speed.bandwidth,
            "host_link_bytes_per_second": speed.host_link,
            "launch_seconds": speed.launch,
        },
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _policy_values(policy: Policy) -> dict[str, int | bool]:
    return {
        "kept_layers": policy.kept,
        "recomputed_layers": policy.recomputed,
        "keep_attention": policy.keep_attention,
        "offload": policy.offload,
    }


def draw_plan(report: Report, path: Path) -> None:
    """A PNG of the memory in an optimizer step's last micro-batch, without checkpointing and as chosen, over time.

    Where no checkpointing is the choice, it stands beside recomputing every layer. Raises UserError where the picture
    cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    chosen, card = report.row(CHOICE), report.card
    pair = [report.row(NONE), chosen if chosen.policy.recomputed else report.row(EVERY_LAYER)]
    titles = [
        "no checkpointing" + (": our choice" if not chosen.policy.recomputed else ""),
        f"our choice: {chosen.policy}" if chosen.policy.recomputed else "every layer recomputes",
    ]
    times = [row.step.seconds(report.speed) for row in pair]
    figure = Figure(figsize=(13, 6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    panels = figure.subplots(1, 2, sharey=True, width_ratios=times)  # one millisecond is as wide in both
    top = 1.12 * max(card.size, *(row.peak for row in pair)) / GIB
    panels[0].set(ylabel="memory of the card, GiB", ylim=(0, top))
    for axes, row, title in zip(panels, pair, titles, strict=True):
        _draw_panel(axes, row, report)
        axes.set_title(title, fontsize=10.5, pad=20)
    for size, name, side in ((card.size, "card", "bottom"), (card.budget, "budget", "top")):
        place = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points"}
        panels[1].annotate(f"{name} {size / GIB:.1f} GiB", (1, size / GIB), va=side, fontsize=9, **place)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=9.5)
    plan, train = report.plan, report.recipe.train
    rows = "1 row" if plan.micro_batch_rows == 1 else f"{plan.micro_batch_rows} rows"
    title = (
        f"{report.recipe.model.name} on {card.name}: the last micro-batch of an optimizer step, "
        f"{rows} × {train.seq_len:,} tokens"
    )
    figure.suptitle(textwrap.fill(title, 108), fontweight="bold")
    with _writing(path):
        figure.savefig(path, format="png", dpi=130)


def _draw_panel(axes: "Axes", row: Row, report: Report) -> None:
    card = report.card
    times, kinds = curve(row.step, report.speed)
    labels = [_label(kind, report.recipe) for kind in KINDS]
    axes.stackplot(times, kinds, labels=labels, colors=COLOURS, step="post", linewidth=0)
    totals = [sum(values) for values in zip(*kinds, strict=True)]
    on_card = [total + card.unseen / GIB for total in totals]
    grey: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.6", "hatch": "////", "linewidth": 0}
    axes.fill_between(times, totals, on_card, step="post", label=UNSEEN, **grey)
    axes.step(times, on_card, where="post", color="0.3", linewidth=0.7)
    axes.axhline(card.size / GIB, color="black", linewidth=1.6)
    axes.axhline(card.budget / GIB, color="black", linewidth=0.8, linestyle="--")
    start = 0.0
    for name, length in phases(row.step, report.speed).items():
        axes.axvline(start, color="black", linewidth=0.6, linestyle=":")
        at, side = (start + length / 2, "center") if name != "optimizer" else (times[-1], "right")  # it is short
        axes.text(at, 1.01, name, transform=axes.get_xaxis_transform(), ha=side, fontsize=8, color="0.25")
        start += length
    _, top = axes.get_ylim()
    # Then the words would lie on the card's line or the budget's.
    card_line_near = card.size / GIB - 0.2 * top < row.peak / GIB <= card.size / GIB
    highest = max(range(len(totals)), key=totals.__getitem__)
    axes.annotate(
        f"peak {row.peak / GIB:.1f} GiB, {_room(card, row)}",
        (times[highest], on_card[highest]),
        xytext=(times[highest], (card.size if card_line_near else row.peak) / GIB + 0.04 * top),
        ha="center",
        fontweight="bold",
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"},
        arrowprops={"arrowstyle": "-|>", "facecolor": "black", "shrinkA": 0, "shrinkB": 0},
        zorder=5,
    )
    axes.set(xlabel="modelled time, ms", xlim=(0, times[-1]))
    axes.spines[["top", "right"]].set_visible(False)


def phases(step: Step, speed: Speed) -> dict[str, float]:
    """Milliseconds of the parts of a step, in order."""
    lengths = dict.fromkeys(("forward", "head and loss", "backward", "optimizer"), 0.0)
    for segment in step.segments:
        name = {"embedding": "forward", "loss": "head and loss"}.get(segment.name, segment.name)
        lengths[name if name in lengths else name.split()[0]] += 1e3 * speed.seconds(segment.work)
    return lengths


def curve(step: Step, speed: Speed) -> tuple[list[float], list[list[float]]]:
    """Milliseconds, and for each of KINDS the GiB from then on: of each POINTS-th of the time its worst moment.

    The allocations and releases of a segment are spread evenly over it.
    """
    total = step.seconds(speed)
    moments = step.timeline()
    start, worst = 0.0, [(0.0, step.base)]  # seconds, bytes
    interval = -1
    for segment in step.segments:
        length = speed.seconds(segment.work)
        for index in range(len(segment.events)):
            _, now = next(moments)
            at = start + length * index / len(segment.events)
            if int(at / total * POINTS) > interval:
                interval = int(at / total * POINTS)
                worst.append((at, now.copy()))
            elif sum(now.values()) > sum(worst[-1][1].values()):
                worst[-1] = at, now.copy()
        start += length
    worst.append((total, worst[-1][1]))
    return [1e3 * at for at, _ in worst], [[now[kind] / GIB for _, now in worst] for kind in KINDS]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _label(kind: str, recipe: Recipe) -> str:
    return f"{'4-bit' if recipe.model.bits == 4 else '16-bit'} weights" if kind == WEIGHTS else kind


def _room(card: Card, row: Row) -> str:
    room = (card.size - row.peak) / GIB
    return f"{room:.1f} GiB free" if row.fits else f"{-room:.1f} GiB over"


def _key(name: str) -> str:
    return re.sub(r"\W+", "_", name).lower()


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
