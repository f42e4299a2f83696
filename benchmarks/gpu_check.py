"""Measures and tests all that only a GPU can show, unattended, in pieces of less than ten minutes.

    make gpu-check                                        # all of it, the most telling pieces first
    make gpu-check ARGS="--pieces kernels bench-llama3-8b-4096"
    make gpu-check ARGS="--pieces longest rows streaming"  # all pieces whose names begin so
    make gpu-check ARGS="--list"                           # the pieces, and about how long each takes
    make gpu-check ARGS="--seconds 600"                    # no piece begins that would end later, by that estimate
    make gpu-check ARGS=--rehearse                        # without a GPU: every piece, small, on the tiny model
    python3 -m benchmarks.gpu_check --peers .site/peers   # without make; unsloth at versions of its own

Each piece leaves its result on disk. When one fails or runs too long, a line says so, and the next one begins. Logs and
a summary, which is written after each piece, go to benchmarks/results/gpu_check/ (rehearsals: outputs/gpu_check/). With
--resume the pieces of the bench and of the longest rows go on with what they measured before.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks.results_folder import write_result
from benchmarks.stacks import STACKS
from common import REPOSITORY

LIMIT_SECONDS = 590  # that a piece may take
MODELS = ("llama3-8b", "mistral-7b", "qwen-14b")
FIRST_STACKS = ("ours", "trl", "trl + liger", "unsloth")  # of the bench; the others follow in a piece of their own
# Of the longest rows, with the tokens of the first row that is tried on a card of 24 GiB. A wrong one costs tries.
LONGEST_STACKS = {
    "ours": 131_072,
    "unsloth, tiled MLP": 131_072,
    "unsloth": 65_536,
    "trl, offload": 32_768,
    "trl": 32_768,
}
ROW_LENGTHS = (8_192, 32_768, 131_072)  # at which tokens/s of long rows are compared
# Seconds that pieces take whose names begin so, guessed for an H100 and never measured. All others: 590, the limit.
ESTIMATES = {
    "kernels": 120,
    "forms": 60,
    "memory-long": 400,
    "memory": 300,
    "profile": 90,
    "dryrun": 90,
    "rows-llama3-8b-8192": 300,
    "rows-llama3-8b-32768": 450,
    "streaming-llama3-8b": 400,
    "streaming-llama3-70b": 500,
}
FIRST_TESTS = "head_loss or packed_attention or kernel or lean or policy"  # of tests/test_gpu.py; all else needs these


def pieces(results: Path, peers: str | None, rehearse: bool, resume: bool = False) -> dict[str, list[str]]:
    """The command of each piece by its name, in the order in which they run.

    results: the folder for their results. peers: PYTHONPATH of unsloth. rehearse: small pieces that run on a CPU.
    resume: go on with results that are there.
    """
    python = [sys.executable, "-m"]

    def bench(model: str, tokens: int, *flags: str, goes_on: bool = resume) -> list[str]:
        kind = "bench_dpo" if "--dpo" in flags else "bench"
        out = str(results / f"{kind}_{model.replace('-', '_')}_{tokens}.json")
        command = [*python, "benchmarks.bench", "--models", model, "--tokens", str(tokens), "--rounds", "1"]
        return [*command, *flags, *peer_flags, *(["--resume"] if goes_on else []), "--out", out]

    def long_rows(kind: str, model: str, *flags: str, goes_on: bool = resume) -> list[str]:
        out = str(results / f"{kind}_{model.replace('-', '_')}.json")
        command = [*python, "benchmarks.longest_row", "--model", model, "--seconds", str(LIMIT_SECONDS - 20)]
        return [*command, *flags, *peer_flags, *(["--resume"] if goes_on else []), "--out", out]

    peer_flags = ["--peers", peers] if peers else []
    if rehearse:
        return {
            "kernels": [*python, "pytest", "tests/kernels/test_kernels.py", "-k", "rope or swiglu"],
            "forms": [*python, "benchmarks.kernels", "--tokens", "64", "--repeats", "3", "--out", str(results)],
            "bench-tiny-128": bench("tiny", 128, "--steps", "2", "--warmup", "1"),
            "longest-tiny": long_rows("longest_row", "tiny", "--stacks", "ours", "--first", "1024", "--most", "2048"),
            # unsloth is not installed here, or finds no GPU: a line says so, and the others go on
            "rows-tiny": long_rows("rows", "tiny", "--stacks", "unsloth", "trl", "--lengths", "64", "128"),
            "streaming-tiny": memory_command(
                results, "tiny", "_streamed", "--tokens", "64", "--on-host", "0", "4", "--policies", "half", "offload"
            ),
            "profile": profile_command(results, "tiny", 64),
        }
    tests = [*python, "pytest", "-m", "gpu", "tests/test_gpu.py", "-s"]
    commands = {"kernels": [*tests, "-k", FIRST_TESTS]}
    commands["forms"] = [*python, "benchmarks.kernels", "--out", str(results)]
    commands["memory-llama3-8b"] = memory_command(results, "llama3-8b")
    others = [stack for stack in STACKS if stack not in FIRST_STACKS]

    def bench_both(model: str, tokens: int) -> None:
        commands[f"bench-{model}-{tokens}"] = bench(model, tokens, "--stacks", *FIRST_STACKS)
        # Into the same file: all stacks on one card in ten minutes would be too many.
        commands[f"bench-others-{model}-{tokens}"] = bench(model, tokens, "--stacks", *others, goes_on=True)

    bench_both("llama3-8b", 4096)
    commands["profile"] = profile_command(results, "llama3-8b", 4096)
    commands["dryrun"] = [*python, "recipes", "dryrun", "llama3-8b"]
    commands["bench-dpo-llama3-8b-4096"] = bench("llama3-8b", 4096, "--dpo")
    for tokens in (2048, 8192):
        bench_both("llama3-8b", tokens)
    # Tokens/s at each length, then the longest row: first within 12 GiB, which rows a third as long fill in a tenth of
    # the time. Each length, and each stack, is a piece of its own, because a row of 131,072 tokens takes minutes.
    for number, tokens in enumerate(ROW_LENGTHS):
        commands[f"rows-llama3-8b-{tokens}"] = long_rows(
            "rows", "llama3-8b", "--stacks", *LONGEST_STACKS, "--lengths", str(tokens), goes_on=resume or number > 0
        )
    for gib in (12, 24):
        for number, (stack, first) in enumerate(LONGEST_STACKS.items()):
            name = stack.replace(", ", "-").replace(" ", "-").lower()
            commands[f"longest-llama3-8b-{gib}gib-{name}"] = long_rows(
                f"longest_row_{gib}gib",
                "llama3-8b",
                *("--stacks", stack, "--card-gib", str(gib), "--first", str(first * gib // 24 // 2048 * 2048)),
                *("--step", "2048" if gib == 12 else "4096"),
                goes_on=resume or number > 0,
            )
    commands["memory-long-llama3-8b"] = memory_command(
        results,
        "llama3-8b",
        "_long",
        *("--tokens", "32768", "65536", "--policies", "tiles", "by-head", "--repeats", "1"),
    )
    for model in MODELS[1:]:
        for tokens in (4096, 2048, 8192):
            bench_both(model, tokens)
    for model in MODELS[1:]:
        commands[f"memory-{model}"] = memory_command(results, model)
    commands["streaming-llama3-8b"] = memory_command(
        results, "llama3-8b", "_streamed", "--tokens", "2048", "--on-host", "0", "8", "16", "32"
    )
    # Where the machine has 40 GiB of free host memory; a line says so where it has not.
    commands["streaming-llama3-70b"] = memory_command(
        results,
        "llama3-70b",
        "_streamed",
        *("--tokens", "2048", "--on-host", "80", "--embedding-on-host", "--policies", "every-layer", "offload"),
    )
    commands["tests"] = [*tests, "-k", f"not ({FIRST_TESTS})"]
    return commands


def memory_command(results: Path, model: str, kind: str = "", *flags: str) -> list[str]:
    """kind: the end of the file's name."""
    out = results / f"memory_{model.replace('-', '_')}{kind}.json"
    return [sys.executable, "-m", "benchmarks.memory", "--models", model, *flags, "--out", str(out)]


def profile_command(results: Path, model: str, tokens: int) -> list[str]:
    flags = ["--model", model, "--tokens", str(tokens), "--out", str(results)]
    return [sys.executable, "-m", "benchmarks.profile_step", *flags]


def chosen_pieces(names: list[str], known: dict[str, list[str]]) -> list[str]:
    """The pieces of these names; of one that is no piece's, those whose names begin with it. Raises KeyError."""
    found: list[str] = []
    for name in names:
        fitting = [name] if name in known else [piece for piece in known if piece.startswith(f"{name}-")]
        if not fitting:
            raise KeyError(name)
        found += [piece for piece in fitting if piece not in found]
    return found


def estimated_seconds(name: str) -> int:
    """About how long a piece takes on an H100, guessed."""
    return next((seconds for start, seconds in ESTIMATES.items() if name.startswith(start)), LIMIT_SECONDS)


def run_piece(name: str, command: list[str], log: Path) -> str:
    """Runs a piece; what it prints goes to the log. Returns how it ended, in words."""
    started = time.monotonic()
    with log.open("w") as output:
        output.write(f"$ {' '.join(command)}\n\n")
        output.flush()
        piece = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = piece.wait(LIMIT_SECONDS)
            ended = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {LIMIT_SECONDS} s"
        finally:  # all that it started too: a stack that trains on would slow down the next piece
            with contextlib.suppress(ProcessLookupError):
                os.killpg(piece.pid, signal.SIGKILL)
            piece.wait()
    return f"{ended} in {time.monotonic() - started:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pieces", nargs="+", metavar="NAME", help="only these, in this order; beginnings of names too"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no piece begins that would end later")
    parser.add_argument("--peers", help="a folder with unsloth and the versions it needs, for PYTHONPATH")
    parser.add_argument("--rehearse", action="store_true", help="every kind of piece, small, on the CPU")
    parser.add_argument("--resume", action="store_true", help="go on with what the bench and longest rows measured")
    parser.add_argument("--list", action="store_true", help="name the pieces and end")
    args = parser.parse_args()
    results = REPOSITORY / ("outputs" if args.rehearse else "benchmarks/results") / "gpu_check"
    known = pieces(results, args.peers, args.rehearse, args.resume)
    if args.list:
        for name, command in known.items():
            print(f"{name:40} {estimated_seconds(name):4} s, guessed  {' '.join(command[1:])}")
        return 0
    try:
        chosen = chosen_pieces(args.pieces, known) if args.pieces else list(known)
    except KeyError as error:
        print(f"error: there is no piece {error}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    if not args.rehearse and not torch.cuda.is_available():
        print("error: torch sees no GPU here; ARGS=--rehearse runs every kind of piece on the CPU", file=sys.stderr)
        return 2
    results.mkdir(parents=True, exist_ok=True)
    summary = {"date": date.today().isoformat(), "machine": "CPU" if args.rehearse else torch.cuda.get_device_name()}
    ends = time.monotonic() + args.seconds
    for name in chosen:
        print(f"{name} …", end=" ", flush=True)
        if time.monotonic() + estimated_seconds(name) > ends:
            summary[name] = f"left out: it takes about {estimated_seconds(name)} s, by a guess"
        else:
            summary[name] = run_piece(name, known[name], results / f"{name}.log")
        print(summary[name], flush=True)
        write_result(summary, results / "summary.json")
    print(f"logs and results are in {results}")
    return 0 if all(summary[name].startswith(("done", "left out")) for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
