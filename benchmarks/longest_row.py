"""Finds the longest single row that each stack trains on this card, and its speed there; or the speed at given lengths.

    python -m benchmarks.longest_row --model llama3-8b --peers /path/with/unsloth
    python -m benchmarks.longest_row --model llama3-8b --stacks ours trl --seconds 3000 --resume
    python -m benchmarks.longest_row --model llama3-8b --lengths 8192 32768 131072      # tokens/s at these, no search
    python -m benchmarks.longest_row --model tiny --stacks trl --card-gib 2 --step 4096      # a rehearsal on a CPU

A try is two optimizer steps of one row, the second of which is timed, in a process of its own: one that runs out of
memory leaves nothing behind. Lengths are multiples of --step, doubled until a try fails, then halved in between. On a
GPU with more memory than --card-gib another process holds the rest; on a CPU --card-gib limits the data of each
process. A longer row may fail by time and not by memory: the table says which. Results go to
benchmarks/results/longest_row_<model>_<machine>.json after each try; --resume goes on with what it has, and tries again
what took too long where there is more time, and what was not installed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from benchmarks.bench import describe_machine, in_percent, in_teraflops
from benchmarks.model_flops import flops_per_token
from benchmarks.results_folder import read_result, result_path, write_result
from benchmarks.run_stack import (
    CHECKPOINTS,
    LIMIT_SECONDS,
    NOT_INSTALLED,
    TOO_LONG,
    Result,
    limit_free_memory,
    make_checkpoint_once,
    run_stack,
    tokens_per_s,
    write_rows,
)
from benchmarks.stacks import NEEDS_GPU, STACKS, Job
from common.machine.device import GIB
from common.machine.gpus import use_one_gpu
from common.plan.speed import data_sheet_flops
from common.recipe import UserError

SHORTEST_TRY_SECONDS = 60.0  # a stack needs about as long until it trains
POSITIONS = 1 << 20  # that the model is said to have; longer rows than its own mean nothing, and cost the same


def next_tokens(trained: Mapping[int, bool], first: int, step: int, most: int) -> int | None:
    """How long the next row to try is; None when the longest is known.

    trained: by the length of each row that was tried, whether it trained. first, step, most: the first length, the
    number that all are multiples of, and the longest.
    """
    good = max((tokens for tokens, ok in trained.items() if ok), default=0)
    bad = min((tokens for tokens, ok in trained.items() if not ok), default=None)
    if bad is None:
        return None if good >= most else min(2 * good or first, most)
    return None if bad - good <= step else (good + bad) // 2 // step * step


def longest(tries: list[Result]) -> Result | None:
    """The try with the longest row that trained; None where none did."""
    return max((one for one in tries if "failed" not in one), key=lambda one: one["job"]["tokens"], default=None)


def stopped_by(tries: list[Result]) -> str:
    """Why no longer row trained."""
    failed = [one for one in tries if "failed" in one]
    if not failed:
        return "nothing: no longer row was tried"
    shortest = min(failed, key=lambda one: one["job"]["tokens"])
    if not_installed(shortest):
        return str(shortest["failed"])
    return f"{shortest['job']['tokens']:,} tokens: {shortest['failed']}"


def make_long_checkpoint(name: str) -> Path:
    """The model's checkpoint with a config that allows rows of POSITIONS tokens. Returns its folder."""
    source, folder = make_checkpoint_once(name), CHECKPOINTS / f"{name}-long"
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        link = folder / path.name
        link.unlink(missing_ok=True)
        if path.name == "config.json":
            link.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": POSITIONS}))
        else:
            link.symlink_to(path)
    return folder


def try_row(stack: str, tokens: int, folder: Path, args: argparse.Namespace, seconds: float) -> Result:
    """seconds: that the try may take."""
    limit = args.card_gib
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        write_rows(rows, tokens, 2, folder)
        job = Job(str(folder), str(rows), tokens, accumulation=1, warmup=1, steps=1, card_gib=limit, started_at=0.0)
        result = run_stack(stack, job, args.peers, seconds)
    return result | {"job": asdict(job), "try_seconds": seconds}


def not_installed(one: Result) -> bool:
    """Whether a library of the stack is missing: no other length would train."""
    return one.get("failed", "").startswith(NOT_INSTALLED)


def too_early(one: Result, try_seconds: float) -> bool:
    """Whether the try says nothing with this limit of time: it was stopped by a lower one, or a library was missing."""
    return not_installed(one) or (one.get("failed", "").startswith(TOO_LONG) and one["try_seconds"] < try_seconds)


def new_report(args: argparse.Namespace) -> Result:
    gpu = torch.cuda.is_available()
    return {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "command": "python -m benchmarks.longest_row " + " ".join(sys.argv[1:]),
        "model": args.model,
        "card_gib": args.card_gib,
        "step": args.step,
        "data_sheet_flops": data_sheet_flops(torch.cuda.get_device_name()) if gpu else None,
        "tries": {},
        "flops_per_token": {},  # by the length of each row that trained
    }


def read_report(path: Path, fresh: Result) -> Result:
    """The report of earlier tries, to go on with. Raises UserError when they were of another setting."""
    report: Result = read_result(path)
    for name in ("machine", "model", "card_gib", "step"):
        if report[name] != fresh[name]:
            raise UserError(f"{path} has the {name} {report[name]}, and this is {fresh[name]}: take another --out")
    return report


def table(report: Result) -> str:
    """The longest row of each stack as a Markdown table."""
    lines = [
        "| stack | longest row | tokens/s there | TFLOP/s | MFU | peak allocated / reserved | a longer one |",
        "|---|---|---|---|---|---|---|",
    ]
    sheet = report["data_sheet_flops"]
    for stack, tries in report["tries"].items():
        best = longest(tries)
        if best is None:
            lines.append(f"| {stack} | {'none' if tries else 'not tried'} | – | – | – | – | {stopped_by(tries)} |")
            continue
        tokens, rate = best["job"]["tokens"], tokens_per_s(best)
        flops = rate * report["flops_per_token"][str(tokens)]
        sizes = [best[name] for name in ("allocated_bytes", "reserved_bytes") if best[name] is not None]
        peak = " / ".join(f"{size / GIB:.1f}" for size in sizes) + " GiB" if sizes else "–"
        lines.append(
            f"| {stack} | {tokens:,} | {rate:,.0f} | {in_teraflops(flops)} "
            f"| {in_percent(flops / sheet if sheet else None)} | {peak} | {stopped_by(tries)} |"
        )
    return "\n".join(lines)


def speed_table(report: Result) -> str:
    """Tokens per second of each stack at each length that was tried, as a Markdown table."""
    lengths = sorted({one["job"]["tokens"] for tries in report["tries"].values() for one in tries})
    lines = [
        "| stack | " + " | ".join(f"{tokens:,} tokens" for tokens in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for stack, tries in report["tries"].items():
        said = {one["job"]["tokens"]: one.get("failed") or f"{tokens_per_s(one):,.0f} tokens/s" for one in tries}
        lines.append(f"| {stack} | " + " | ".join(said.get(tokens, "not tried") for tokens in lengths) + " |")
    return "\n".join(lines)


def find_longest(stack: str, folder: Path, report: Result, out: Path, args: argparse.Namespace, ends: float) -> bool:
    """Tries rows until the longest is known; the report is written after each. Returns whether the time sufficed."""
    tries = [one for one in report["tries"].get(stack, []) if not too_early(one, args.try_seconds)]
    report["tries"][stack] = tries
    while True:
        known = {one["job"]["tokens"]: "failed" not in one for one in tries}
        if args.lengths:
            tokens = next((length for length in args.lengths if length not in known), None)
        else:
            tokens = next_tokens(known, args.first, args.step, args.most)
        if tokens is None or any(map(not_installed, tries)):
            return True
        left = ends - time.monotonic()
        if left < SHORTEST_TRY_SECONDS:
            return False
        tries.append(result := try_row(stack, tokens, folder, args, min(left, args.try_seconds)))
        if "failed" not in result and str(tokens) not in report["flops_per_token"]:
            report["flops_per_token"][str(tokens)] = flops_per_token(args.model, tokens)
        write_result(report, out)
        outcome = result.get("failed") or f"{tokens_per_s(result):,.0f} tokens/s"
        print(f"{stack}, {tokens:,} tokens: {outcome}", flush=True)


def main() -> int:
    use_one_gpu()  # the stacks, which inherit it, would each do something else with several
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b" if gpu else "tiny")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=[s for s in STACKS if gpu or s not in NEEDS_GPU])
    parser.add_argument("--card-gib", type=float, default=24.0)
    parser.add_argument("--first", type=int, default=16_384, help="tokens of the first row that is tried")
    parser.add_argument("--most", type=int, default=524_288, help="tokens of the longest")
    parser.add_argument("--lengths", nargs="+", type=int, help="exactly these, in this order, and no search")
    parser.add_argument("--step", type=int, default=1_024, help="lengths are multiples of it")
    parser.add_argument("--try-seconds", type=float, default=LIMIT_SECONDS, help="that a try may take")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all tries together; --resume goes on")
    parser.add_argument("--peers", help="a folder with unsloth and the versions it needs, for PYTHONPATH")
    parser.add_argument("--out", type=Path, help="the .json")
    parser.add_argument("--resume", action="store_true", help="go on with what the .json has, where there is one")
    args = parser.parse_args()
    if args.first % args.step or args.most % args.step or not 0 < args.first <= args.most <= POSITIONS:
        parser.error(f"--first and --most must be multiples of --step {args.step}, --first at most --most")
    if args.lengths and not 0 < min(args.lengths) <= max(args.lengths) <= POSITIONS:
        parser.error(f"--lengths are from 1 to {POSITIONS:,} tokens")
    ends = time.monotonic() + args.seconds
    out = args.out or result_path(f"longest_row_{args.model.replace('-', '_')}")
    out.parent.mkdir(parents=True, exist_ok=True)
    report = new_report(args)
    try:
        report = read_report(out, report) if args.resume and out.exists() else report
    except UserError as error:
        parser.error(str(error))
    folder = make_long_checkpoint(args.model)
    with limit_free_memory(args.card_gib):
        in_time = [find_longest(stack, folder, report, out, args, ends) for stack in args.stacks]
    print(f"\n{(speed_table if args.lengths else table)(report)}\n\nwritten to {out}")
    if not all(in_time):
        print("the time was over before all was tried: the same command with --resume goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
