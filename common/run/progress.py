"""What a run shows while it goes on, and keeps of it: the progress line, metrics.jsonl, loss.png."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from common.machine.collectives import barrier
from common.machine.device import GIB, this_machine
from common.machine.processes import is_main_process
from common.run.folder import LOSS_PICTURE, METRICS


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl, oldest first; none when there is no such file yet."""
    path = folder / METRICS
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:  # a killed run may leave half a line
            break
    return entries


class ProgressReport(TrainerCallback):
    """Writes metrics.jsonl, and shows one line: rewritten in place on a terminal, elsewhere each `every` seconds."""

    def __init__(self, folder: Path, every: float = 10.0) -> None:
        self.folder = folder
        self.every = every
        self.live = sys.stdout.isatty()
        self.history = read_metrics(folder)
        self.shown_at = -math.inf
        self.started_at = 0.0
        self.first_step = self.tokens_before = 0

    def on_train_begin(self, _args: Any, state: TrainerState, _control: Any, **__: Any) -> None:
        self.started_at = time.perf_counter()
        self.first_step, self.tokens_before = state.global_step, state.num_input_tokens_seen
        # A resumed run goes through the steps after its checkpoint again.
        self.history = [entry for entry in read_metrics(self.folder) if entry["step"] <= state.global_step]
        lines = [json.dumps(entry) + "\n" for entry in self.history]
        barrier()  # the others have read it
        if is_main_process():
            (self.folder / METRICS).write_text("".join(lines), encoding="utf-8")

    def on_log(
        self, _args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **__: Any
    ) -> None:
        if "eval_loss" in logs:
            self._write({"step": state.global_step, "eval_loss": logs["eval_loss"]})
            self._line(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}", keep=True)
        if "skipped" in logs:
            self._write({"step": state.global_step, "skipped": "its numbers were not finite"})
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self.started_at
        tokens_per_s = (state.num_input_tokens_seen - self.tokens_before) / seconds
        entry = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": logs["learning_rate"],
            "tokens": state.num_input_tokens_seen,
            "tokens_per_s": round(tokens_per_s, 1),
            "peak_gib": round(this_machine().peak_bytes() / GIB, 3),
            "seconds": round(seconds, 3),
        }
        self._write(entry)
        left = seconds / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
        self._line(
            f"step {state.global_step}/{state.max_steps} | loss {entry['loss']:.4f} | "
            f"lr {entry['learning_rate']:.2e} | "
            f"{tokens_per_s:,.0f} tokens/s | peak {entry['peak_gib']:.2f} GiB | {duration(left)} left",
            keep=state.global_step == state.max_steps,
        )

    def _write(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        if not is_main_process():
            return
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _line(self, text: str, *, keep: bool) -> None:
        if self.live:
            print(f"\r\033[K{text}", end="\n" if keep else "", flush=True)
        elif keep or time.perf_counter() - self.shown_at >= self.every:
            print(text, flush=True)
            self.shown_at = time.perf_counter()


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def draw_loss(folder: Path) -> None:
    """loss.png: training loss of each step, held-out loss where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = read_metrics(folder)
    training = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    held_out = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", linewidth=1.2, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", color="tab:orange", markersize=5, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token (nats)", title=folder.name, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / LOSS_PICTURE, dpi=120)
    pyplot.close(figure)
