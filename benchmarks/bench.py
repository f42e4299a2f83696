"""Times our training step beside other stacks: tokens per second, memory, time to the first step, losses.

    make bench                                                    # three models at 24 GiB; without a GPU the tiny one
    make bench ARGS="--models llama3-8b --tokens 4096 --stacks ours trl unsloth --peers /path/with/unsloth"

Each stack runs in a process of its own, in turn, `--rounds` times. The rate is that of the median step of the median
round; the slowest and the fastest round stand in brackets. On a GPU with more memory than `--card-gib`, another process
holds the rest. Results go to benchmarks/results/bench_<machine>: the .json after each measurement, the .png at the end.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.models import recipe_of
from benchmarks.results_folder import result_path, write_result
from benchmarks.stacks import NEEDS_GPU, STACKS, Job
from common import REPOSITORY
from common.machine.device import GIB, this_machine
from common.machine.gpus import use_one_gpu
from common.model.activation_checkpointing import Policy
from common.plan.forecast import Forecast

CHECKPOINTS = Path(tempfile.gettempdir()) / "qlora-bench"  # a folder for each model
LIMIT_SECONDS = 540  # that one process may take
Result = dict[str, Any]


def make_checkpoint_once(name: str) -> Path:
    """Makes the model's 4-bit checkpoint, unless an earlier benchmark has. Returns its folder."""
    folder = CHECKPOINTS / name
    if not (folder / "tokenizer.json").exists():  # the file that is written last
        subprocess.run([sys.executable, "-m", "benchmarks.models", name, str(folder)], check=True, cwd=REPOSITORY)
    return folder


def write_rows(path: Path, tokens: int, rows: int, folder: Path) -> None:
    """Writes rows of token ids, each of `tokens` ids and one example, made from the shipped conversations' text.

    folder: of the model whose tokenizer is used.
    """
    from transformers import AutoTokenizer

    lines = (REPOSITORY / "data" / "tiny" / "train.jsonl").read_text().splitlines()
    text = "\n".join(message["content"] for line in lines for message in json.loads(line)["messages"])
    stream = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    stream *= -(-tokens * rows // len(stream))
    path.write_text("".join(json.dumps(stream[i * tokens : (i + 1) * tokens]) + "\n" for i in range(rows)))


@contextmanager
def limit_free_memory(gib: float | None) -> Iterator[None]:
    """Leaves only `gib` of the GPU's memory free inside the block. None, and no GPU, leave all."""
    if gib is None or not torch.cuda.is_available():
        yield
        return
    command = [sys.executable, "-m", "benchmarks.ballast", "--leave-gib", str(gib)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ballast:
        assert ballast.stdin and ballast.stdout
        print(f"ballast {ballast.stdout.readline().strip()}", flush=True)
        try:
            yield
        finally:
            ballast.stdin.close()


def run_stack(stack: str, job: Job, peers: str | None) -> Result:
    """Runs a stack in a process of its own. Returns its result, or under "failed" the reason in words."""
    environment = dict(os.environ)
    if peers and stack.startswith("unsloth"):
        environment["PYTHONPATH"] = os.pathsep.join([peers, str(REPOSITORY)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(asdict(replace(job, started_at=time.time()))))
        command = [sys.executable, "-m", "benchmarks.stacks", stack, "--job", str(path)]
        try:
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=environment,
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"stack": stack, "failed": f"took longer than {LIMIT_SECONDS} s"}
    if done.returncode:
        return {"stack": stack, "failed": describe_failure(done.stderr)}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def describe_failure(stderr: str) -> str:
    """The error that a process ended with, in a few words."""
    lines = [line for line in stderr.splitlines() if re.match(r"[\w.]*(Error|Exception|error)\b", line)]
    last = (lines or stderr.splitlines() or ["no message"])[-1]
    return "out of memory" if "OutOfMemoryError" in last else last[:200]


def tokens_per_s(result: Result) -> float:
    """The rate of the median step."""
    job = result["job"]
    rate: float = job["tokens"] * job["accumulation"] / statistics.median(result["seconds"])
    return rate


def flops_per_token(name: str, tokens: int) -> float:
    """FLOPs of forward and backward, without activation checkpointing and with causal attention.

    Counted from our step as it would run on a GPU.
    """
    recipe = recipe_of(name)
    forecast = Forecast(replace(recipe, train=replace(recipe.train, seq_len=tokens)))
    step = forecast.step(tokens, Policy(forecast.layers, forecast.layers))
    return sum(segment.work.flops for segment in step.segments) / tokens


def summarize(measurements: list[Result], matmul_flops: float) -> list[Result]:
    """Puts the rounds of each model, length and stack together in one entry. matmul_flops: FLOPs per second."""
    entries = []
    references: dict[tuple[str, int], list[float]] = {}  # losses of TRL's first round
    for m in measurements:
        if m["stack"] == "trl" and "losses" in m:
            references.setdefault((m["model"], m["job"]["tokens"]), m["losses"])
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
        entry |= {
            "tokens_per_s": rate,
            "slowest_and_fastest_round": [min(rates), max(rates)],
            "share_of_ceiling": rate * rounds[0]["flops_per_token"] / matmul_flops,
            "allocated_bytes": good[0]["allocated_bytes"],
            "reserved_bytes": good[0]["reserved_bytes"],
            "resident_bytes": good[0]["resident_bytes"],
            "first_step_seconds": statistics.median(m["first_step_seconds"] for m in good),
            "policy": good[0]["policy"],
        }
        reference = references.get((model, tokens))
        if reference and stack != "trl":
            entry["loss_difference"] = max(abs(a - b) for a, b in zip(good[0]["losses"], reference, strict=True))
        entries.append(entry)
    return entries


def table(report: Result) -> str:
    """The summary as a Markdown table, in the order in which the stacks ran."""
    gpu = any(entry.get("allocated_bytes") for entry in report["summary"])
    memory = "peak allocated / reserved" if gpu else "peak of RAM"
    lines = [
        f"| model | tokens a micro-batch | stack | tokens/s | ours is | {memory} | first step | share of the ceiling "
        "| largest loss difference from TRL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {(e["model"], e["tokens"]): e.get("tokens_per_s") for e in report["summary"] if e["stack"] == "ours"}
    for entry in report["summary"]:
        start = f"| `{entry['model']}` | {entry['tokens']:,} | {entry['stack']} |"
        if "failed" in entry:
            lines.append(f"{start} {entry['failed']} | – | – | – | – | – |")
            continue
        mine = ours.get((entry["model"], entry["tokens"]))
        ratio = f"{mine / entry['tokens_per_s']:.2f} ×" if mine and entry["stack"] != "ours" else "–"
        sizes = (entry["allocated_bytes"], entry["reserved_bytes"]) if gpu else (entry["resident_bytes"],)
        peak = " / ".join(f"{size / GIB:.1f}" for size in sizes)
        slowest, fastest = entry["slowest_and_fastest_round"]
        difference = f"{entry['loss_difference']:.4f}" if "loss_difference" in entry else "–"
        lines.append(
            f"{start} {entry['tokens_per_s']:,.0f} ({slowest:,.0f} – {fastest:,.0f}) | {ratio} | {peak} GiB "
            f"| {entry['first_step_seconds']:.0f} s | {entry['share_of_ceiling']:.0%} | {difference} |"
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
        colours = ["#1f77b4" if entry["stack"] == "ours" else "#b0b7bf" for entry in entries]
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


def measure_case(model: str, tokens: int, args: argparse.Namespace) -> Iterator[Result]:
    """Runs every stack on one model and length, in turn, `--rounds` times; yields each result as it comes."""
    folder, flops = make_checkpoint_once(model), flops_per_token(model, tokens)
    with tempfile.TemporaryDirectory() as scratch, limit_free_memory(args.card_gib):
        rows = Path(scratch) / "rows.jsonl"
        write_rows(rows, tokens, (args.warmup + args.steps) * args.accumulation, folder)
        limit = args.card_gib if torch.cuda.is_available() else None
        job = Job(str(folder), str(rows), tokens, args.accumulation, args.warmup, args.steps, limit, 0.0)
        for _ in range(args.rounds):
            for stack in args.stacks:
                result = run_stack(stack, job, args.peers)
                yield result | {"model": model, "job": asdict(job), "flops_per_token": flops}


def main() -> int:
    use_one_gpu()  # the stacks, which inherit it, would each do something else with several
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama3-8b", "mistral-7b", "qwen-14b"] if gpu else ["tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192] if gpu else [256])
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=[s for s in STACKS if gpu or s not in NEEDS_GPU])
    parser.add_argument("--steps", type=int, default=20, help="timed optimizer steps")
    parser.add_argument("--warmup", type=int, default=5, help="optimizer steps before them")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of an optimizer step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--card-gib", type=float, default=24.0)
    parser.add_argument("--peers", help="a folder with unsloth and the versions it needs, for PYTHONPATH")
    parser.add_argument("--out", type=Path, help="the .json; the picture goes beside it")
    args = parser.parse_args()
    if args.warmup < 1 or args.steps < 1:
        parser.error("--warmup and --steps must be at least 1")
    out = args.out or result_path("bench")
    out.parent.mkdir(parents=True, exist_ok=True)
    matmul = subprocess.run(
        [sys.executable, "-m", "benchmarks.ceiling"], check=True, cwd=REPOSITORY, capture_output=True, text=True
    )
    report: Result = {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "command": "python -m benchmarks.bench " + " ".join(sys.argv[1:]),
        "card_gib": args.card_gib if gpu else None,
        "matmul_flops": float(matmul.stdout),
        "summary": [],
        "measurements": [],
    }
    for model in args.models:
        for tokens in args.tokens:
            for result in measure_case(model, tokens, args):
                report["measurements"].append(result)
                report["summary"] = summarize(report["measurements"], report["matmul_flops"])
                write_result(report, out)
                outcome = result.get("failed") or f"{tokens_per_s(result):,.0f} tokens/s"
                print(f"{model}, {tokens:,} tokens, {result['stack']}: {outcome}", flush=True)
    draw(report, out.with_suffix(".png"))
    print(f"\n{table(report)}\n\nwritten to {out}, drawn in {out.with_suffix('.png')}")
    return 0 if all("failed" not in entry for entry in report["summary"] if entry["stack"] == "ours") else 1


if __name__ == "__main__":
    sys.exit(main())
