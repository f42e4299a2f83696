"""The result of benchmarks.defaults as a table in Markdown and as a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

GRID_POINTS = 90  # of results that do not say: 2 data sets, 3 ranks, 3 alphas, 5 learning rates
NARROW = 4.0  # a panel whose losses differ by a larger factor has a logarithmic axis

Entry = dict[str, Any]


def best_of(entries: list[Entry], **where: Any) -> Entry | None:
    """The entry of seed 0 with the lowest held-out loss, among those whose values are these. None without one."""
    found = [entry for entry in _grid(entries, **where) if entry["held_out_loss"] is not None]
    return min(found, key=lambda entry: entry["held_out_loss"]) if found else None


def base_loss(entries: list[Entry], data: str) -> float | None:
    """The held-out loss of the base, nats; None where no entry has it."""
    return next((e["before"] for e in entries if e["data"] == data and e["before"] is not None), None)


def losses_of_seeds(entries: list[Entry], best: Entry) -> list[float | None]:
    """Held-out losses of the best point, one for each seed; None for one that diverged."""
    names = ("data", "rank", "alpha", "learning_rate")
    return [entry["held_out_loss"] for entry in entries if all(entry[name] == best[name] for name in names)]


def describe(entry: Entry) -> str:
    """The entry in a line."""
    at = f"rank {entry['rank']}, alpha {entry['alpha']:g}, {entry['learning_rate']:g}, seed {entry['seed']}"
    return f"{entry['data']}, {at}: held-out loss {_loss(entry)}, {entry['seconds']:.0f} s"


def table(result: Entry) -> str:
    """What was run, the best learning rate of each rank and alpha, and the spread of the seeds."""
    entries, settings = result["points"], result["settings"]
    rows = f"{settings['rows_per_step']} row" + "s" * (settings["rows_per_step"] > 1)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{settings['model']} in NF4, {settings['steps']} steps of {rows} of {settings['seq_len']:,} tokens, at most "
        f"{settings['held_out_rows']} held-out rows; {count_points(result)}. {result['machine']}, {result['date']}; "
        f"{versions}.",
        "",
        "| data | rank | alpha | best learning rate | alpha × rate | held-out loss | at half the rate | at twice |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data in result["data"]:
        for rank in _values(entries, "rank", data=data):
            for alpha in _values(entries, "alpha", data=data, rank=rank):
                lines.append(_row(entries, data, rank, alpha))
    lines += ["", *(f"- {_sentence(entries, data)}" for data in _values(entries, "data")), ""]
    lines.append(
        "Short runs favour large learning rates; what carries over to longer ones is how ranks and alphas compare."
    )
    return "\n".join(lines)


def count_points(result: Entry) -> str:
    """How much of the grid is there, in words."""
    done, planned = len(_grid(result["points"])), result.get("grid_points", GRID_POINTS)
    return f"all {done} points of the grid" if done == planned else f"{done} of {planned} points of the grid so far"


def _grid(entries: list[Entry], **where: Any) -> list[Entry]:
    """The entries of seed 0 whose values are these."""
    return [e for e in entries if e["seed"] == 0 and all(e[name] == value for name, value in where.items())]


def _values(entries: list[Entry], name: str, **where: Any) -> list[Any]:
    """The values of a field, each once: numbers in order, names as they come."""
    found = list(dict.fromkeys(entry[name] for entry in _grid(entries, **where)))
    return found if name == "data" else sorted(found)


def _loss(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    return "diverged" if entry["held_out_loss"] is None else f"{entry['held_out_loss']:.4f}"


def _row(entries: list[Entry], data: str, rank: int, alpha: float) -> str:
    best = best_of(entries, data=data, rank=rank, alpha=alpha)
    if best is None:
        return f"| {data} | {rank} | {alpha:g} | – | – | diverged at every rate | – | – |"
    rate = best["learning_rate"]
    beside = []
    for factor in (0.5, 2.0):
        found = [e for e in _grid(entries, data=data, rank=rank, alpha=alpha) if _is_near(e, factor * rate)]
        beside.append(_loss(found[0] if found else None))
    loss = f"{_loss(best)} | {beside[0]} | {beside[1]}"
    return f"| {data} | {rank} | {alpha:g} | {rate:g} | {alpha * rate:g} | {loss} |"


def _is_near(entry: Entry, rate: float) -> bool:
    return bool(abs(entry["learning_rate"] / rate - 1) < 1e-6)


def _sentence(entries: list[Entry], data: str) -> str:
    base, best = base_loss(entries, data), best_of(entries, data=data)
    before = "" if base is None else f"the base has {base:.4f}; "
    if best is None:
        return f"{data}: {before}every point diverged."
    at = f"rank {best['rank']}, alpha {best['alpha']:g}, learning rate {best['learning_rate']:g}"
    losses = losses_of_seeds(entries, best)
    if len(losses) < 2:
        return f"{data}: {before}the best point is {at}; other seeds have not run."
    finite = [loss for loss in losses if loss is not None]
    each = ", ".join("diverged" if loss is None else f"{loss:.4f}" for loss in losses)
    spread = f"{max(finite) - min(finite):.4f}" if len(finite) > 1 else "not known"
    return f"{data}: {before}the best point, {at}, has {each} with {len(losses)} seeds: a spread of {spread}."


def draw(result: Entry, path: Path) -> None:
    """Held-out loss over alpha × learning rate: a panel for each data set, a colour for each rank, a marker each alpha.

    A point that diverged, or lies above the base, is at the upper edge.
    """
    from matplotlib.figure import Figure

    entries = result["points"]
    names = _values(entries, "data")
    figure = Figure(figsize=(5.2 * len(names) + 0.6, 4.4), layout="constrained")
    colours = _styles(_values(entries, "rank"), ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f"))
    markers = _styles(_values(entries, "alpha"), ("o", "s", "^", "D", "v", "P"))
    for number, data in enumerate(names, 1):
        axis = figure.add_subplot(1, len(names), number)
        base = base_loss(entries, data)
        losses = [e["held_out_loss"] for e in _grid(entries, data=data) if e["held_out_loss"] is not None]
        is_wide = bool(losses) and max(losses) > NARROW * min(losses)
        ceiling = max(losses, default=1.0) if base is None or is_wide else min(base, max(losses, default=base))
        for rank in _values(entries, "rank", data=data):
            for alpha in _values(entries, "alpha", data=data, rank=rank):
                line = sorted(_grid(entries, data=data, rank=rank, alpha=alpha), key=lambda e: e["learning_rate"])
                xs = [entry["alpha"] * entry["learning_rate"] for entry in line]
                ys = [ceiling if e["held_out_loss"] is None else min(ceiling, e["held_out_loss"]) for e in line]
                style: Entry = {"color": colours(rank), "marker": markers(alpha), "markersize": 5.5, "linewidth": 0.9}
                axis.plot(xs, ys, label=f"rank {rank}, alpha {alpha:g}", alpha=0.8, **style)
        if base is not None and not is_wide:
            axis.axhline(base, color="#555555", linestyle=":", linewidth=1, label="base, and what is not better")
        axis.set_xscale("log", base=2)
        if is_wide:
            axis.set_yscale("log")
        ticks = sorted({e["alpha"] * e["learning_rate"] for e in _grid(entries, data=data)})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45, fontsize=8)
        axis.minorticks_off()
        _set_loss_ticks(axis, losses, is_wide)
        axis.set_xlabel("alpha × learning rate")
        axis.set_ylabel("held-out loss, nats per token")
        axis.set_title(data if base is None else f"{data} (base: {base:.2f})", fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    settings = result["settings"]
    figure.suptitle(
        f"{settings['model']} in NF4, {settings['steps']} steps of {settings['rows_per_step']} × "
        f"{settings['seq_len']:,} tokens, {count_points(result)}, {result['date']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


def _styles(values: list[Any], styles: tuple[str, ...]) -> Callable[[Any], str]:
    """Each value's style; more values than styles begin again."""
    return lambda value: styles[values.index(value) % len(styles)]


def _set_loss_ticks(axis: Any, losses: list[float], is_wide: bool) -> None:
    if not is_wide:
        return
    steps = [round(factor * 10**power, 6) for power in range(-3, 3) for factor in (1, 1.5, 2, 3, 5, 7)]
    ticks = [step for step in steps if 0.9 * min(losses) <= step <= 1.1 * max(losses)]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
