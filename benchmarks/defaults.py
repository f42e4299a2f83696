"""Which alpha and learning rate learn most: short runs over a grid of ranks, alphas and learning rates.

    python -m benchmarks.defaults --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --data "tool calls=data/tiny/train.jsonl" --data "instructions=instructions.json"

Each point trains a fresh adapter on the 4-bit base, on the same rows in the same order, and measures the loss of the
same held-out rows. Then the best point of each data set is run with two other seeds: what differs by less than their
spread is no difference. Points that are in the result already are not run again, so a sweep that was stopped goes on
with the same command. The compute dtype is bf16 (fp16 on a GPU without it), on a CPU too, where it takes half the time.
Writes defaults_<gpu or cpu>.json and .png into benchmarks/results, and prints a table.
"""

import argparse
import contextlib
import io
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks.results_folder import installed_versions, read_result, result_path, write_result
from common.data import load_rows
from common.data.batches import Batch, collate
from common.machine.device import Machine, this_machine
from common.model import attach_lora, load_4bit, load_tokenizer, use_lean_layers
from common.model.attention import uses_packed_attention
from common.model.optimizer import build_optimizer
from common.recipe import DataSpec, LoraSpec, ModelSpec, TrainSpec
from common.run.lr_schedule import build_lr_schedule

RANKS, ALPHAS = (16, 64, 8), (32.0, 16.0, 64.0)  # the ones that matter most first
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)  # by factors of two, as the alphas: products of both coincide
OTHER_SEEDS = (1, 2)  # of the best point


@dataclass(frozen=True)
class Settings:
    """What all points of a sweep share. Rows are packed rows of seq_len tokens."""

    model: str
    steps: int
    rows_per_step: int
    seq_len: int
    held_out_rows: int


@dataclass(frozen=True)
class Point:
    """One run. data: the name of a data set."""

    data: str
    rank: int
    alpha: float
    learning_rate: float
    seed: int = 0


@dataclass(frozen=True)
class Sweep:
    """data: the file or hub data set of each name."""

    settings: Settings
    data: dict[str, str]

    def points(self) -> list[Point]:
        grid = product(RANKS, self.data, ALPHAS, LEARNING_RATES)
        return [Point(data, rank, alpha, rate) for rank, data, alpha, rate in grid]


def compute_machine() -> Machine:
    machine = this_machine()
    return machine if machine.is_gpu else Machine(machine.device, torch.bfloat16, "half the time", machine.name)


@cache  # in each worker
def rows_of(settings: Settings, source: str) -> tuple[Dataset, Dataset, int]:
    """Packed rows to train on, and to hold out, and the token that pads."""
    tokenizer = load_tokenizer(ModelSpec(settings.model))
    spec = DataSpec(source, eval_rows=10**6, max_long_share=1.0)  # a tenth of the examples is held out
    rows = load_rows(spec, tokenizer, settings.seq_len, shows_example=False)
    assert rows.evaluation is not None
    return rows.train, rows.evaluation, tokenizer.pad_token_id


def run_point(settings: Settings, source: str, point: Point) -> dict[str, Any]:
    """Trains one adapter. Returns the point and its losses in nats: of each step, and held out before and after."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train_rows, held_out, pad = rows_of(settings, source)
        machine = compute_machine()
        model = attach_lora(
            load_4bit(ModelSpec(settings.model), machine), LoraSpec(point.rank, point.alpha), point.seed
        )
        use_lean_layers(model, "lean" if machine.is_gpu else "stock")  # which a CPU computes faster in bf16
    train = TrainSpec(settings.seq_len, settings.rows_per_step, point.learning_rate)
    optimizer = build_optimizer(model, train)
    schedule = build_lr_schedule(optimizer, train.lr_schedule, train.warmup_ratio, settings.steps)
    as_batch = partial(collate, pad_token_id=pad, padding_free=uses_packed_attention(model))

    def nll(batch: Batch) -> torch.Tensor:
        inputs = {name: v.to(machine.device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        with torch.autocast(machine.device.type, machine.dtype):
            loss: torch.Tensor = model(**inputs, num_items_in_batch=len(batch["trained_positions"])).loss
        return loss

    @torch.no_grad()
    def held_out_loss() -> float:
        batches = [as_batch([held_out[row]]) for row in range(min(settings.held_out_rows, len(held_out)))]
        tokens = [len(batch["trained_positions"]) for batch in batches]
        return sum(nll(b).item() * n for b, n in zip(batches, tokens, strict=True)) / sum(tokens)

    before = held_out_loss() if (point.alpha, point.learning_rate) == (ALPHAS[0], LEARNING_RATES[0]) else None
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(point.seed)).tolist()
    losses = []
    for step in range(settings.steps):
        rows = [order[(step * settings.rows_per_step + n) % len(order)] for n in range(settings.rows_per_step)]
        loss = nll(as_batch([train_rows[row] for row in rows]))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    after = held_out_loss()
    return {
        **asdict(point),
        "before": before,
        "held_out_loss": after if math.isfinite(after) else None,
        "losses": [loss if math.isfinite(loss) else None for loss in losses],
        "seconds": round(time.perf_counter() - started, 1),
    }


def run_points(sweep: Sweep, points: list[Point], processes: int) -> Iterator[dict[str, Any]]:
    """The results of the points, as they end. processes: each with an equal share of the CPU's threads."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as pool:
        waiting = [pool.submit(run_point, sweep.settings, sweep.data[point.data], point) for point in points]
        for future in waiting:
            yield future.result()


def is_of(point: Point, entry: dict[str, Any]) -> bool:
    return asdict(point) == {name: entry[name] for name in asdict(point)}


def best_of(entries: list[dict[str, Any]], **where: Any) -> dict[str, Any] | None:
    """The entry of seed 0 with the lowest held-out loss among those whose values are these."""
    found = [
        entry
        for entry in entries
        if entry["seed"] == 0
        and entry["held_out_loss"] is not None
        and all(entry[name] == value for name, value in where.items())
    ]
    return min(found, key=lambda entry: entry["held_out_loss"]) if found else None


def run_sweep(sweep: Sweep, path: Path, processes: int) -> dict[str, Any]:
    """Runs the points that the result does not have yet, and writes it after each. Returns the whole result."""
    settings = {"settings": asdict(sweep.settings), "data": sweep.data}
    result: dict[str, Any] = {**settings, "points": []}
    if path.exists() and (earlier := read_result(path))["settings"] == settings["settings"]:
        result["points"] = earlier["points"]
    result |= {
        "machine": str(compute_machine()),
        "versions": installed_versions(("torch", "transformers", "peft", "bitsandbytes")),
        "date": date.today().isoformat(),
    }

    def run_missing(points: list[Point]) -> None:
        missing = [p for p in points if not any(is_of(p, entry) for entry in result["points"])]
        for number, entry in enumerate(run_points(sweep, missing, processes), 1):
            result["points"].append(entry)
            write_result(result, path)
            print(f"{number}/{len(missing)} {describe(entry)}", flush=True)

    run_missing(sweep.points())
    best = [best_of(result["points"], data=name) for name in sweep.data]
    names = [*asdict(Point("", 1, 1.0, 1.0))]
    run_missing([Point(**{n: b[n] for n in names} | {"seed": seed}) for b in best if b for seed in OTHER_SEEDS])
    return result


def describe(entry: dict[str, Any]) -> str:
    loss = "diverged" if entry["held_out_loss"] is None else f"{entry['held_out_loss']:.4f}"
    at = f"rank {entry['rank']}, alpha {entry['alpha']:g}, {entry['learning_rate']:g}, seed {entry['seed']}"
    return f"{entry['data']}, {at}: held-out loss {loss}, {entry['seconds']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", action="append", metavar="NAME=SOURCE", help="a name and a file or hub data set")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rows-per-step", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--held-out-rows", type=int, default=16)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    data = dict(pair.split("=", 1) for pair in flags.data or ["tool calls=data/tiny/train.jsonl"])
    settings = Settings(flags.model, flags.steps, flags.rows_per_step, flags.seq_len, flags.held_out_rows)
    path = flags.json or result_path("defaults")
    run_sweep(Sweep(settings, data), path, flags.processes)


if __name__ == "__main__":
    sys.exit(main())
