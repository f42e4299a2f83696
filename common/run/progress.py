"""What a run shows while it goes on, and keeps of it: the progress line, metrics.jsonl."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.machine.collectives import barrier
from common.machine.device import GIB, this_machine
from common.machine.processes import is_main_process
from common.machine.slow_work import (
    LINE_SECONDS,
    called_in_thread,
    format_duration,
    seconds_between_statuses,
    show_status,
)
from common.run.metrics_file import MetricsFile
from common.run.preference_metrics import HELD_OUT, in_words, taken_from


class ProgressReport(TrainerCallback):
    """Writes metrics.jsonl, and shows a progress line: after each step on a terminal, every second in a notebook,
    elsewhere every `every` seconds.

    Inside `without_silence` no longer time passes between two lines: the last step's line is shown, or the micro-batch
    that a slow step is at.
    """

    def __init__(self, folder: Path, every: float = LINE_SECONDS) -> None:
        self.folder = folder
        self.every, self.check_every = every, every / 10
        self.metrics = MetricsFile(folder)
        self.shown_at = -math.inf
        self.started_at = 0.0
        self.first_step = self.tokens_before = 0
        self.waiting_line: str | None = None  # of the last step, while it was not shown
        self.step_under_way: tuple[int, int] | None = None  # its number, and the micro-batches that are done
        self.micro_batches, self.steps = 1, 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """The entries of metrics.jsonl, and those that wait for room on the disk."""
        return self.metrics.entries

    @contextmanager
    def without_silence(self) -> Iterator[None]:
        with called_in_thread(self._break_silence, self.check_every, self.check_every):
            yield

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, _: TrainerControl, **__: Any) -> None:
        self.started_at = time.perf_counter()
        self.first_step, self.tokens_before = state.global_step, state.num_input_tokens_seen
        self.micro_batches, self.steps = args.gradient_accumulation_steps, state.max_steps
        self.metrics.keep_until(state.global_step)  # a resumed run computes the steps after its checkpoint again
        barrier()  # every process has read the file before it is written
        if is_main_process():
            self.metrics.write()

    def on_step_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        self.step_under_way = (state.global_step + 1, 0)

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        if self.step_under_way is not None:
            number, done = self.step_under_way
            self.step_under_way = (number, done + 1)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_under_way = None

    def on_log(
        self, _args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **__: Any
    ) -> None:
        if "eval_loss" in logs:
            self._write({"step": state.global_step, "eval_loss": logs["eval_loss"], **taken_from(logs)})
            more = in_words(logs, HELD_OUT)
            self._show(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}{more}", keep=True)
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
            **taken_from(logs),
        }
        self._write(entry)
        left = seconds / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
        line = (
            f"step {state.global_step}/{state.max_steps} | loss {entry['loss']:.4f}"
            f"{in_words(entry)} | lr {entry['learning_rate']:.2e} | {tokens_per_s:,.0f} tokens/s | "
            f"peak {entry['peak_gib']:.2f} GiB | {format_duration(left)} left"
        )
        is_last = state.global_step == state.max_steps
        if is_last or time.perf_counter() - self.shown_at >= seconds_between_statuses(self.every):
            self._show(line, keep=is_last)
        else:
            self.waiting_line = line

    def _break_silence(self) -> None:
        step, silent = self.step_under_way, time.perf_counter() - max(self.shown_at, self.started_at)
        if step is None or silent <= self.every - self.check_every:
            return
        if self.waiting_line is not None:
            self._show(self.waiting_line)
        else:
            number, done = step
            at = f", micro-batch {done + 1} of {self.micro_batches}" if self.micro_batches > 1 else ""
            self._show(f"step {number}/{self.steps} under way{at}")

    def _show(self, text: str, *, keep: bool = False) -> None:
        self.waiting_line = None
        show_status(text, keep=keep)
        self.shown_at = time.perf_counter()

    def _write(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        if is_main_process():
            self.metrics.write()
