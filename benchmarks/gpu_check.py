"""Measures and tests all that only a GPU can show, unattended, in pieces of less than ten minutes.

    make gpu-check                                        # all of it, the most telling pieces first
    make gpu-check ARGS="--pieces kernels bench-llama3-8b-4096"
    make gpu-check ARGS=--rehearse                        # without a GPU: every piece, small, on the tiny model
    python3 -m benchmarks.gpu_check --peers .site/peers   # without make; unsloth at versions of its own

Each piece leaves its result on disk. When one fails or runs too long, a line says so, and the next one begins. Logs and
a summary, which is written after each piece, go to benchmarks/results/gpu_check/ (rehearsals: outputs/gpu_check/).
"""

import argparse
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks.results_folder import write_result
from common import REPOSITORY

LIMIT_SECONDS = 590  # that a piece may take
MODELS = ("llama3-8b", "mistral-7b", "qwen-14b")
FIRST_TESTS = "head_loss or packed_attention or kernel or lean or policy"  # of tests/test_gpu.py; all else needs these


def pieces(results: Path, peers: str | None, rehearse: bool) -> dict[str, list[str]]:
    """The command of each piece by its name, in the order in which they run.

    results: the folder for their results. peers: PYTHONPATH of unsloth. rehearse: small pieces that run on a CPU.
    """
    python = [sys.executable, "-m"]
    if rehearse:
        return {
            "kernels": [*python, "pytest", "tests/kernels/test_kernels.py", "-k", "rope or swiglu"],
            "forms": [*python, "benchmarks.kernels", "--tokens", "64", "--repeats", "3", "--out", str(results)],
            "bench-tiny-128": bench_command(results, None, "tiny", 128, "--steps", "2", "--warmup", "1"),
            "profile": profile_command(results, "tiny", 64),
        }
    tests = [*python, "pytest", "-m", "gpu", "tests/test_gpu.py", "-s"]
    commands = {"kernels": [*tests, "-k", FIRST_TESTS]}
    commands["forms"] = [*python, "benchmarks.kernels", "--out", str(results)]
    commands["memory-llama3-8b"] = memory_command(results, "llama3-8b")
    commands["bench-llama3-8b-4096"] = bench_command(results, peers, "llama3-8b", 4096)
    commands["profile"] = profile_command(results, "llama3-8b", 4096)
    commands["dryrun"] = [*python, "recipes", "dryrun", "llama3-8b"]
    for tokens in (2048, 8192):
        commands[f"bench-llama3-8b-{tokens}"] = bench_command(results, peers, "llama3-8b", tokens)
    for model in MODELS[1:]:
        for tokens in (4096, 2048, 8192):
            commands[f"bench-{model}-{tokens}"] = bench_command(results, peers, model, tokens)
    for model in MODELS[1:]:
        commands[f"memory-{model}"] = memory_command(results, model)
    commands["tests"] = [*tests, "-k", f"not ({FIRST_TESTS})"]
    return commands


def bench_command(results: Path, peers: str | None, model: str, tokens: int, *flags: str) -> list[str]:
    out = results / f"bench_{model.replace('-', '_')}_{tokens}.json"
    command = [sys.executable, "-m", "benchmarks.bench", "--models", model, "--tokens", str(tokens), "--out", str(out)]
    return [*command, "--rounds", "1", *flags, *(["--peers", peers] if peers else [])]


def memory_command(results: Path, model: str) -> list[str]:
    out = results / f"memory_{model.replace('-', '_')}.json"
    return [sys.executable, "-m", "benchmarks.memory", "--models", model, "--out", str(out)]


def profile_command(results: Path, model: str, tokens: int) -> list[str]:
    flags = ["--model", model, "--tokens", str(tokens), "--out", str(results)]
    return [sys.executable, "-m", "benchmarks.profile_step", *flags]


def run_piece(name: str, command: list[str], log: Path) -> str:
    """Runs a piece; what it prints goes to the log. Returns how it ended, in words."""
    started = time.monotonic()
    with log.open("w") as output:
        output.write(f"$ {' '.join(command)}\n\n")
        output.flush()
        try:
            environment = os.environ | {"PYTHONUNBUFFERED": "1"}
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_SECONDS,
                check=False,
            )
            ended = "done" if done.returncode == 0 else f"failed with status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {LIMIT_SECONDS} s"
    return f"{ended} in {time.monotonic() - started:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", metavar="NAME", help="only these, in this order")
    parser.add_argument("--peers", help="a folder with unsloth and the versions it needs, for PYTHONPATH")
    parser.add_argument("--rehearse", action="store_true", help="every kind of piece, small, on the CPU")
    parser.add_argument("--list", action="store_true", help="name the pieces and end")
    args = parser.parse_args()
    results = REPOSITORY / ("outputs" if args.rehearse else "benchmarks/results") / "gpu_check"
    known = pieces(results, args.peers, args.rehearse)
    if args.list:
        print("\n".join(f"{name:24} {' '.join(command[1:])}" for name, command in known.items()))
        return 0
    unknown = [name for name in args.pieces or () if name not in known]
    if unknown:
        print(f"error: there is no piece {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    if not args.rehearse and not torch.cuda.is_available():
        print("error: torch sees no GPU here; ARGS=--rehearse runs every kind of piece on the CPU", file=sys.stderr)
        return 2
    results.mkdir(parents=True, exist_ok=True)
    summary = {"date": date.today().isoformat(), "machine": "CPU" if args.rehearse else torch.cuda.get_device_name()}
    for name in args.pieces or known:
        print(f"{name} …", end=" ", flush=True)
        summary[name] = run_piece(name, known[name], results / f"{name}.log")
        print(summary[name], flush=True)
        write_result(summary, results / "summary.json")
    print(f"logs and results are in {results}")
    return 0 if all("done" in summary[name] for name in args.pieces or known) else 1


if __name__ == "__main__":
    sys.exit(main())
