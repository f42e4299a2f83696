"""Times our training step beside other stacks: tokens per second, memory, time to the first step, losses.

    make bench                                                    # three models at 24 GiB; without a GPU the tiny one
    make bench ARGS="--models llama3-8b --tokens 4096 --stacks ours trl unsloth --peers /path/with/unsloth"
    make bench ARGS=--dpo                                         # on pairs, beside TRL's DPOTrainer

Each stack runs in a process of its own, in turn, `--rounds` times. The rate is that of the median step of the median
round; the slowest and the fastest round stand in brackets. On a GPU with more memory than `--card-gib`, another process
holds the rest. Results go to benchmarks/results/bench_<machine>: the .json after each measurement, the .png at the end.
With --resume, what the .json has already is not measured again: more stacks, or the rest of a bench that was stopped.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path

import matplotlib
import torch

from benchmarks.model_flops import flops_per_token
from benchmarks.results_folder import read_result, result_path, write_result
from benchmarks.run_stack import (
    Result,
    limit_free_memory,
    make_checkpoint_once,
    run_stack,
    tokens_per_s,
    write_rows,
)
from benchmarks.stacks import ALL_STACKS, DPO_STACKS, NEEDS_GPU, STACKS, Job
from common import REPOSITORY
from common.machine.device import GIB, this_machine
from common.machine.gpus import use_one_gpu
from common.plan.speed import data_sheet_flops
from common.recipe import UserError

OURS, TRL = ("ours", "ours, dpo"), ("trl", "trl, dpo")  # what others are compared with, and whose losses they are
OTHER_ORDER = ("trl, dpo, precomputed",)  # its pass for the reference draws random numbers before the rows' order


def summarize(measurements: list[Result], matmul_flops: float, sheet_flops: float | None = None) -> list[Result]:
    """Puts the rounds of each model, length and stack together in one entry.

    In FLOPs per second: matmul_flops as measured on this machine, sheet_flops by the card's data sheet, where known.
    """
    entries = []
    references: dict[tuple[str, int, bool], list[float]] = {}  # losses of TRL's first round
    for m in measurements:
        if m["stack"] in TRL and "losses" in m:
            references.setdefault((m["model"], m["job"]["tokens"], m["stack"] in DPO_STACKS), m["losses"])
    cases = dict.fromkeys((m["model"], m["job"]["tokens"], m["stack"]) for m in measurements)
    for model, tokens, stack in cases:
        rounds = [m for m in measurements if (m["model"], m["job"]["tokens"], m["stack"]) == (model, tokens, stack)]
        entry: Result = {"model": model, "tokens": tokens, "stack": stack}
        good = [m for m in rounds if "failed" not in m]
        if not good:
            entries.append(entry | {"failed": rounds[0]["failed"]})
            continue
        rates = [tokens_per_s(m) for m in good]
        rate = statistics.median(rates)
        flops = rate * rounds[0]["flops_per_token"]
        entry |= {
            "tokens_per_s": rate,
            "slowest_and_fastest_round": [min(rates), max(rates)],
            "flops_per_second": flops,
            "mfu": flops / sheet_flops if sheet_flops else None,
            "share_of_ceiling": flops / matmul_flops,
            "allocated_bytes": good[0]["allocated_bytes"],
            "reserved_bytes": good[0]["reserved_bytes"],
            "resident_bytes": good[0]["resident_bytes"],
            "first_step_seconds": statistics.median(m["first_step_seconds"] for m in good),
            "policy": good[0]["policy"],
        }
        reference = references.get((model, tokens, stack in DPO_STACKS))
        if reference and stack not in (*TRL, *OTHER_ORDER):
            entry["loss_difference"] = max(abs(a - b) for a, b in zip(good[0]["losses"], reference, strict=True))
        entries.append(entry)
    return entries


def in_teraflops(flops: float) -> str:
    return f"{flops / 1e12:,.0f}" if flops >= 1e13 else f"{flops / 1e12:.2g}"


def in_percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def table(report: Result) -> str:
    """The summary as a Markdown table, in the order in which the stacks ran."""
    gpu = any(entry.get("allocated_bytes") for entry in report["summary"])
    memory = "peak allocated / reserved" if gpu else "peak of RAM"
    lines = [
        f"| model | tokens a micro-batch | stack | tokens/s | ours is | {memory} | first step | TFLOP/s | MFU "
        "| share of the ceiling | largest loss difference from TRL |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {
        (e["model"], e["tokens"], e["stack"] in DPO_STACKS): e.get("tokens_per_s")
        for e in report["summary"]
        if e["stack"] in OURS
    }
    for entry in report["summary"]:
        start = f"| `{entry['model']}` | {entry['tokens']:,} | {entry['stack']} |"
        if "failed" in entry:
            lines.append(f"{start} {entry['failed']} | – | – | – | – | – | – | – |")
            continue
        mine = ours.get((entry["model"], entry["tokens"], entry["stack"] in DPO_STACKS))
        ratio = f"{mine / entry['tokens_per_s']:.2f} ×" if mine and entry["stack"] not in OURS else "–"
        sizes = (entry["allocated_bytes"], entry["reserved_bytes"]) if gpu else (entry["resident_bytes"],)
        peak = " / ".join(f"{size / GIB:.1f}" for size in sizes)
        slowest, fastest = entry["slowest_and_fastest_round"]
        difference = f"{entry['loss_difference']:.4f}" if "loss_difference" in entry else "–"
        lines.append(
            f"{start} {entry['tokens_per_s']:,.0f} ({slowest:,.0f} – {fastest:,.0f}) | {ratio} | {peak} GiB "
            f"| {entry['first_step_seconds']:.0f} s | {in_teraflops(entry['flops_per_second'])} "
            f"| {in_percent(entry['mfu'])} | {entry['share_of_ceiling']:.0%} | {difference} |"
        )
    return "\n".join(lines)


def draw(report: Result, path: Path) -> None:
    """Draws the tokens per second of every stack, in a panel for each model and length."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((entry["model"], entry["tokens"]) for entry in report["summary"]))
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases) + 2, 3.6), squeeze=False, layout="constrained")
    for axis, (model, tokens) in zip(axes[0], cases, strict=True):
        entries = [e for e in report["summary"] if (e["model"], e["tokens"]) == (model, tokens)][::-1]
        rates = [entry.get("tokens_per_s", 0.0) for entry in entries]
        colours = ["#1f77b4" if entry["stack"] in OURS else "#b0b7bf" for entry in entries]
        bars = axis.barh([entry["stack"] for entry in entries], rates, color=colours)
        labels = [f"{e['tokens_per_s']:,.0f}" if "tokens_per_s" in e else "failed" for e in entries]
        axis.bar_label(bars, labels, padding=3)
        axis.set_xlim(0, 1.2 * max([*rates, 1.0]))
        axis.set_title(f"{model}, {tokens:,} tokens a micro-batch", fontsize=10)
        axis.set_xlabel("tokens/s")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['machine']}, {report['date']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def describe_machine() -> str:
    """The name of the GPU; without one the name of the CPU."""
    machine = this_machine()
    if machine.is_gpu:
        return machine.name
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {machine.name}"


def measure_case(
    model: str, tokens: int, args: argparse.Namespace, done: Container[tuple[str, int, str, int]]
) -> Iterator[Result]:
    """Runs every stack on one model and length, in turn, `--rounds` times; yields each result as it comes.

    done: model, tokens, stack and round of what is left out.
    """
    turns = [(number, stack) for number in range(args.rounds) for stack in args.stacks]
    turns = [(number, stack) for number, stack in turns if (model, tokens, stack, number) not in done]
    if not turns:
        return
    folder, flops = make_checkpoint_once(model), flops_per_token(model, tokens)
    with tempfile.TemporaryDirectory() as scratch, limit_free_memory(args.card_gib):
        rows = Path(scratch) / "rows.jsonl"
        write_rows(rows, tokens, (args.warmup + args.steps) * args.accumulation, folder)
        limit = args.card_gib if torch.cuda.is_available() else None
        job = Job(str(folder), str(rows), tokens, args.accumulation, args.warmup, args.steps, limit, 0.0)
        for number, stack in turns:
            result = run_stack(stack, job, args.peers)
            yield result | {"model": model, "round": number, "job": asdict(job), "flops_per_token": flops}


def read_report(path: Path, args: argparse.Namespace) -> Result:
    """The report of an earlier bench, to go on with. Raises UserError when it measured something else."""
    report: Result = read_result(path)
    for measurement in report["measurements"]:
        for setting in ("warmup", "steps", "accumulation"):
            if (was := measurement["job"][setting]) != (now := getattr(args, setting)):
                raise UserError(f"{path} was measured with --{setting} {was}, not {now}: take another --out")
    if (was := report["machine"]) != (now := describe_machine()):
        raise UserError(f"{path} was measured on {was}, and this is {now}: take another --out")
    return report


def measure_ceiling() -> float:
    """FLOPs per second of this machine's matmul, measured in a process that leaves no memory behind."""
    command = [sys.executable, "-m", "benchmarks.ceiling"]
    return float(subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, text=True).stdout)


def new_report(args: argparse.Namespace) -> Result:
    gpu = torch.cuda.is_available()
    return {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "command": "python -m benchmarks.bench " + " ".join(sys.argv[1:]),
        "card_gib": args.card_gib if gpu else None,
        "matmul_flops": measure_ceiling(),
        "data_sheet_flops": data_sheet_flops(torch.cuda.get_device_name()) if gpu else None,
        "summary": [],
        "measurements": [],
    }


def main() -> int:
    use_one_gpu()  # the stacks, which inherit it, would each do something else with several
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama3-8b", "mistral-7b", "qwen-14b"] if gpu else ["tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192] if gpu else [256])
    parser.add_argument("--stacks", nargs="+", choices=ALL_STACKS, help="left out, all that this machine can run")
    parser.add_argument("--dpo", action="store_true", help="pairs, and the stacks that train on them")
    parser.add_argument("--steps", type=int, default=20, help="timed optimizer steps")
    parser.add_argument("--warmup", type=int, default=5, help="optimizer steps before them")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of an optimizer step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--card-gib", type=float, default=24.0)
    parser.add_argument("--peers", help="a folder with unsloth and the versions it needs, for PYTHONPATH")
    parser.add_argument("--out", type=Path, help="the .json; the picture goes beside it")
    parser.add_argument("--resume", action="store_true", help="go on with what the .json has, where there is one")
    args = parser.parse_args()
    if args.warmup < 1 or args.steps < 1:
        parser.error("--warmup and --steps must be at least 1")
    args.stacks = args.stacks or [s for s in (DPO_STACKS if args.dpo else STACKS) if gpu or s not in NEEDS_GPU]
    out = args.out or result_path("bench_dpo" if args.dpo else "bench")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        report = read_report(out, args) if args.resume and out.exists() else new_report(args)
    except UserError as error:
        parser.error(str(error))
    done = {(m["model"], m["job"]["tokens"], m["stack"], m.get("round", 0)) for m in report["measurements"]}
    for model in args.models:
        for tokens in args.tokens:
            for result in measure_case(model, tokens, args, done):
                report["measurements"].append(result)
                report["summary"] = summarize(
                    report["measurements"], report["matmul_flops"], report.get("data_sheet_flops")
                )
                write_result(report, out)
                outcome = result.get("failed") or f"{tokens_per_s(result):,.0f} tokens/s"
                print(f"{model}, {tokens:,} tokens, {result['stack']}: {outcome}", flush=True)
    draw(report, out.with_suffix(".png"))
    print(f"\n{table(report)}\n\nwritten to {out}, drawn in {out.with_suffix('.png')}")
    return 0 if all("failed" not in entry for entry in report["summary"] if entry["stack"] in OURS) else 1


if __name__ == "__main__":
    sys.exit(main())
