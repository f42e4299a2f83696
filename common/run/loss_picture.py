"""loss.png: the losses of a run as a picture."""

from pathlib import Path
from typing import Any

from common.machine.disk import write_aside
from common.run.folder import LOSS_PICTURE
from common.run.metrics_file import read_metrics
from common.run.preference_metrics import ACCURACY


def draw_loss(folder: Path, kept_step: int | None = None) -> None:
    """Draws loss.png: the training loss of each step, and the held-out loss where it was measured.

    kept_step: the step whose adapter is left, which is marked.
    """
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import MaxNLocator

    entries = read_metrics(folder)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if training := [(e["step"], e["loss"]) for e in entries if "loss" in e]:
        dot: dict[str, Any] = {"marker": "o", "markersize": 5} if len(training) == 1 else {}  # no line shows one point
        axes.plot(*zip(*training, strict=True), color="tab:blue", linewidth=1.2, label="training", **dot)
    if held_out := [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]:
        axes.plot(*zip(*held_out, strict=True), "o", color="tab:orange", markersize=5, label="held out")
    if kept := [point for point in held_out if point[0] == kept_step][-1:]:
        axes.plot(*kept[0], "o", color="black", fillstyle="none", markersize=10, label=f"kept: step {kept_step:,}")
    unit = "loss" if any(ACCURACY in entry for entry in entries) else "loss per trained token (nats)"
    axes.set(xlabel="optimizer step", ylabel=unit, ylim=(0, None))
    axes.set_title(folder.name, parse_math=False)  # $ in a name is no formula
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with write_aside(folder / LOSS_PICTURE) as aside:
        figure.savefig(aside, format="png", dpi=120)
