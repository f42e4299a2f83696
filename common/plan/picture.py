"""A plan as a picture: the memory of one optimizer step, moment by moment."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.machine.device import GIB
from common.machine.write_errors import writing
from common.plan.report import (
    CHOICE,
    EVERY_LAYER,
    NO_CHECKPOINTING,
    OFFLOAD,
    OVERHEAD,
    PlanReport,
    PolicyRow,
    label_of,
    room_on,
)
from common.plan.speed import Speed
from common.plan.step import KINDS, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 2000  # of a curve: more than the picture has pixels
# In the order of KINDS. Okabe and Ito chose these colours so that colour-blind readers can tell them apart
# (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#56B4E9", "#CC79A7", "#F0E442", "#E69F00", "#009E73", "#000000", "#D55E00")


def draw_plan(report: PlanReport, path: Path) -> None:
    """Draws a PNG: memory over time in the last micro-batch of an optimizer step, without checkpointing and as chosen.

    Where the choice is no checkpointing, the other panel shows recomputing every layer. Below them stands the longest
    row that fits each way. Raises UserError where the picture cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    chosen, card = report.row(CHOICE), report.card
    # Beside a long row in tiles all else would be so high that nothing of the choice were to be seen.
    other = OFFLOAD if chosen.policy.tile else NO_CHECKPOINTING
    pair = [report.row(other), chosen if chosen.policy.recomputed else report.row(EVERY_LAYER)]
    titles = [
        other + (": our choice" if not chosen.policy.recomputed else ""),
        f"our choice: {chosen.policy}" if chosen.policy.recomputed else "every layer recomputes",
    ]
    if waits := report.plan.layout.waits:
        titles[1 if chosen.policy.recomputed else 0] += f"; {waits} in host memory"
    times = [row.step.seconds(report.speed) for row in pair]
    figure = Figure(figsize=(13, 6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    panels = figure.subplots(1, 2, sharey=True, width_ratios=times)  # one millisecond is as wide in both
    top = 1.12 * max(card.size, *(row.peak for row in pair)) / GIB
    panels[0].set(ylabel="memory of the card, GiB", ylim=(0, top))
    for axes, row, title in zip(panels, pair, titles, strict=True):
        _draw_panel(axes, row, report)
        axes.set_title(textwrap.fill(title, 68), fontsize=10.5, pad=20)
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
    figure.suptitle(textwrap.fill(title, 108), fontweight="bold", parse_math=False)  # $ in a name is no formula
    longest = "; ".join(f"{name} {tokens:,}" for name, tokens in report.longest.items())
    longest = textwrap.fill(f"tokens of the longest row that fits: {longest}", 140)
    figure.supxlabel(longest, fontsize=9, color="0.25")
    with writing(path):
        figure.savefig(path, format="png", dpi=130)


def _draw_panel(axes: "Axes", row: PolicyRow, report: PlanReport) -> None:
    card = report.card
    times, kinds = curve(row.step, report.speed)
    labels = [label_of(kind, report.recipe) for kind in KINDS]
    axes.stackplot(times, kinds, labels=labels, colors=COLOURS, step="post", linewidth=0)
    totals = [sum(values) for values in zip(*kinds, strict=True)]
    on_card = [total + card.overhead_bytes / GIB for total in totals]
    grey: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.6", "hatch": "////", "linewidth": 0}
    axes.fill_between(times, totals, on_card, step="post", label=OVERHEAD, **grey)
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
    # Just below the card's line, the words would lie on that line or on the budget's. Then they go above it.
    card_line_near = card.size / GIB - 0.2 * top < row.peak / GIB <= card.size / GIB
    highest = max(range(len(totals)), key=totals.__getitem__)
    axes.annotate(
        f"peak {row.peak / GIB:.1f} GiB, {room_on(card, row)}",
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
    """Milliseconds of each phase of a step, in order."""
    lengths = dict.fromkeys(("forward", "head and loss", "backward", "optimizer"), 0.0)
    for segment in step.segments:
        name = {"embedding": "forward", "loss": "head and loss"}.get(segment.name, segment.name)
        lengths[name if name in lengths else name.split()[0]] += 1e3 * speed.seconds(segment.work)
    return lengths


def curve(step: Step, speed: Speed) -> tuple[list[float], list[list[float]]]:
    """The moments of a curve in milliseconds, and for each of KINDS the GiB from each moment on.

    The time is cut into POINTS intervals. Each interval that has events gives one moment, its worst. The events of a
    segment are spread evenly over the segment.
    """
    total = step.seconds(speed)
    moments = step.timeline()
    start, worst = 0.0, [(0.0, step.resident)]  # seconds, bytes
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
