"""Which alpha and learning rate learn most: short runs over a grid of ranks, alphas and learning rates.

    python -m benchmarks.defaults --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --data "tool calls=data/tiny/train.jsonl" --data "instructions=instructions.json"
    python -m benchmarks.defaults --model meta-llama/Meta-Llama-3-8B-Instruct --data "mine=my_chats.jsonl" \
        --steps 400 --rows-per-step 16 --seq-len 2048 --ranks 16 --alphas 32 --learning-rates 1e-4 2e-4 4e-4
    python -m benchmarks.defaults --draw benchmarks/results/defaults_smollm2_cpu.json     # trains nothing

Each point of the grid trains a fresh adapter on the 4-bit base, on the same rows in the same order, and measures the
loss of the same held-out rows. Then the best point of each data set is run with other seeds: what differs by less than
their spread is no difference. The result is written after each point. The same command goes on where a sweep was
stopped, and adds what a larger grid has more. It ends with a table in Markdown and a picture beside the JSON, which
--draw makes of any result.

Short runs favour large learning rates: they end before a rate that is too large has done its harm, and before one that
is too small has caught up. The best rate of 50 steps is above that of 1,000; what carries over is how ranks and alphas
compare.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.defaults_report import best_of, describe, draw, table
from benchmarks.results_folder import installed_versions, read_result, result_path, write_result
from benchmarks.short_run import Settings, ShortRun, add_flags, bf16_machine, data_of, finite, settings_of
from common.exit_status import exit_status
from common.process_state import quiet_libraries
from common.recipe import LoraSpec, UserError

RANKS, ALPHAS = (16, 64, 8), (32.0, 16.0, 64.0)  # the ones that matter most first
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)  # by factors of two, as the alphas: products of both coincide
OTHER_SEEDS = (1, 2)  # of the best point


@dataclass(frozen=True)
class Point:
    """One run. data: the name of a data set."""

    data: str
    rank: int
    alpha: float
    learning_rate: float
    seed: int = 0

    def is_in(self, entries: list[dict[str, Any]]) -> bool:
        return any(asdict(self) == {name: entry[name] for name in asdict(self)} for entry in entries)


@dataclass(frozen=True)
class Sweep:
    """data: the file or hub data set of each name."""

    settings: Settings
    data: dict[str, str]
    ranks: tuple[int, ...] = RANKS
    alphas: tuple[float, ...] = ALPHAS
    learning_rates: tuple[float, ...] = LEARNING_RATES
    other_seeds: tuple[int, ...] = OTHER_SEEDS

    def grid(self) -> list[Point]:
        points = product(self.ranks, self.data, self.alphas, self.learning_rates)
        return [Point(data, rank, alpha, rate) for rank, data, alpha, rate in points]

    def begin_result(self, path: Path) -> dict[str, Any]:
        """The result at `path`, to go on with, or a new one. Raises UserError when that one is of another sweep."""
        ours, theirs, sources, entries = self.settings, self.settings, dict[str, str](), list[dict[str, Any]]()
        if path.exists():
            earlier = read_result(path)
            theirs, sources, entries = Settings(**earlier["settings"]), earlier["data"], earlier["points"]
        pairs = {name: (value, asdict(theirs)[name]) for name, value in asdict(ours).items()}
        pairs |= {f"data set {name!r}": (source, sources.get(name, source)) for name, source in self.data.items()}
        if other := [f"{name} {old!r}, not {new!r}" for name, (new, old) in pairs.items() if old != new]:
            raise UserError(f"{path} has another sweep: {'; '.join(other)}. Give this one its own file with --json")
        grid = {_values(asdict(point)) for point in self.grid()} | {_values(entry) for entry in entries}
        return {
            "settings": asdict(ours),
            "data": sources | self.data,
            "points": entries,
            "grid_points": len(grid),
            "machine": str(bf16_machine()),
            "versions": installed_versions(("torch", "transformers", "peft", "bitsandbytes")),
            "date": date.today().isoformat(),
        }


def _values(entry: dict[str, Any]) -> tuple[str, int, float, float]:
    """The place of an entry in the grid: all of Point but the seed."""
    return entry["data"], entry["rank"], entry["alpha"], entry["learning_rate"]


def run_point(settings: Settings, source: str, point: Point, measures_base: bool) -> dict[str, Any]:
    """Trains one adapter. Returns the point with its losses in nats: held out before and after, and of each step.

    "before", the loss of the base, is None unless measured here. "held_out_loss" is None where the run diverged, and
    "losses" end there.
    """
    started = time.perf_counter()
    run = ShortRun(settings, source, LoraSpec(point.rank, point.alpha), point.learning_rate, point.seed)
    before = run.held_out_loss() if measures_base else None
    losses = [finite(round(loss, 4)) for loss in run.train()]
    after = finite(run.held_out_loss()) if losses[-1] is not None else None
    seconds = round(time.perf_counter() - started, 1)
    return {**asdict(point), "before": before, "held_out_loss": after, "losses": losses, "seconds": seconds}


def run_points(
    sweep: Sweep, points: list[Point], processes: int, without_base: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """The results of the points, in their order, as they end.

    processes: each with an equal share of the CPU's threads; 1 is this process. without_base: names of the data sets
    whose base is not measured yet, which the first point of each does.
    """
    first = {name: next((point for point in points if point.data == name), None) for name in without_base}
    jobs = [(sweep.settings, sweep.data[point.data], point, point == first.get(point.data)) for point in points]
    if processes == 1:
        yield from (run_point(*job) for job in jobs)
        return
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, context, _begin_worker, (threads,)) as pool:
        waiting = [pool.submit(run_point, *job) for job in jobs]
        for future in waiting:
            yield future.result()


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    quiet_libraries()


def run_sweep(sweep: Sweep, path: Path, processes: int) -> dict[str, Any]:
    """Runs the points that the result at `path` does not have yet, and writes it after each. Returns it.

    Raises UserError as Sweep.begin_result and ShortRun.
    """
    result = sweep.begin_result(path)
    entries: list[dict[str, Any]] = result["points"]

    def run_missing(points: list[Point]) -> None:
        missing = [point for point in points if not point.is_in(entries)]
        with_base = {entry["data"] for entry in entries if entry["before"] is not None}
        for number, entry in enumerate(run_points(sweep, missing, processes, set(sweep.data) - with_base), 1):
            entries.append(entry)
            write_result(result, path)
            print(f"{number}/{len(missing)} {describe(entry)}", flush=True)

    run_missing(sweep.grid())
    best = [best_of(entries, data=name) for name in sweep.data]
    run_missing([Point(*_values(b), seed) for b in best if b for seed in sweep.other_seeds])
    return result


def show(result: dict[str, Any], path: Path) -> None:
    """Prints the table, and draws the picture beside the JSON."""
    picture = path.with_suffix(".png")
    draw(result, picture)
    print(f"{table(result)}\n\ndrawn in {picture}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, held_out_rows=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=LEARNING_RATES)
    parser.add_argument("--other-seeds", type=int, nargs="*", default=OTHER_SEEDS, help="of the best point")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, on a CPU with several cores")
    flags = parser.parse_args(arguments)
    quiet_libraries()
    if flags.draw:
        return exit_status(lambda: show(read_result(flags.draw), flags.draw), str(flags.draw.parent))
    lists = (flags.ranks, flags.alphas, flags.learning_rates, flags.other_seeds)
    sweep = Sweep(settings_of(flags), data_of(flags), *map(tuple, lists))
    path = flags.json or result_path(f"defaults_{Path(flags.model).name}")
    return exit_status(lambda: show(run_sweep(sweep, path, flags.processes), path), str(path.parent))


if __name__ == "__main__":
    sys.exit(main())
