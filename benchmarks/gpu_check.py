"""Everything that only a GPU can show, unattended, in pieces of under ten minutes that each leave their result on disk.

    make gpu-check                                        # all of it, the most telling pieces first
    make gpu-check ARGS="--pieces kernels bench-llama3-8b-4096"
    make gpu-check ARGS=--rehearse                        # without a GPU: every piece, small, on the tiny model
    python3 -m benchmarks.gpu_check --peers .site/peers   # without make; unsloth at versions of its own

A piece that fails or runs too long is said to have, and the next one begins. Logs, and a summary that grows with each
piece, go to benchmarks/results/gpu_check/ (rehearsals: outputs/gpu_check/).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
LIMIT = 590  # seconds a piece may take
MODELS = ("llama3-8b", "mistral-7b", "qwen-14b")
CORRECT = "head_loss or packed_attention or kernel or lean or policy"  # of tests/test_gpu.py: what all else stands on


def pieces(results: Path, peers: str | None, rehearse: bool) -> dict[str, list[str]]:
    """Name and command of each piece, in order."""
    python = [sys.executable, "-m"]
    if rehearse:
        return {
            "kernels": [*python, "pytest", "tests/kernels/test_kernels.py", "-k", "rope or swiglu"],
            "forms": [*python, "benchmarks.kernels", "--tokens", "64", "--repeats", "3", "--out", str(results)],
            "bench-tiny-128": bench(results, None, "tiny", 128, "--steps", "2", "--warmup", "1"),
            "profile": profile(results, "tiny", 64),
        }
    tests = [*python, "pytest", "-m", "gpu", "tests/test_gpu.py", "-s"]
    found = {"kernels": [*tests, "-k", CORRECT]}
    found["forms"] = [*python, "benchmarks.kernels", "--out", str(results)]
    found["memory-llama3-8b"] = memory(results, "llama3-8b")
    found["bench-llama3-8b-4096"] = bench(results, peers, "llama3-8b", 4096)
    found["profile"] = profile(results, "llama3-8b", 4096)
    found["dryrun"] = [*python, "recipes", "dryrun", "llama3-8b"]
    for tokens in (2048, 8192):
        found[f"bench-llama3-8b-{tokens}"] = bench(results, peers, "llama3-8b", tokens)
    for model in MODELS[1:]:
        for tokens in (4096, 2048, 8192):
            found[f"bench-{model}-{tokens}"] = bench(results, peers, model, tokens)
    for model in MODELS[1:]:
        found[f"memory-{model}"] = memory(results, model)
    found["tests"] = [*tests, "-k", f"not ({CORRECT})"]
    return found


def bench(results: Path, peers: str | None, model: str, tokens: int, *flags: str) -> list[str]:
    out = results / f"bench_{model.replace('-', '_')}_{tokens}.json"
    command = [sys.executable, "-m", "benchmarks.bench", "--models", model, "--tokens", str(tokens), "--out", str(out)]
    return [*command, "--rounds", "1", *flags, *(["--peers", peers] if peers else [])]


def memory(results: Path, model: str) -> list[str]:
    out = results / f"memory_{model.replace('-', '_')}.json"
    return [sys.executable, "-m", "benchmarks.memory", "--models", model, "--out", str(out)]


def profile(results: Path, model: str, tokens: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "benchmarks.profile_step",
        "--model",
        model,
        "--tokens",
        str(tokens),
        "--out",
        str(results),
    ]


def run_piece(name: str, command: list[str], log: Path) -> str:
    """How it ended, in words; what it printed is in the log, also when it was stopped."""
    started = time.monotonic()
    with log.open("w") as output:
        output.write(f"$ {' '.join(command)}\n\n")
        output.flush()
        try:
            environment = os.environ | {"PYTHONUNBUFFERED": "1"}
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT, check=False
            )
            ended = "done" if done.returncode == 0 else f"failed with status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {LIMIT} s"
    return f"{ended} in {time.monotonic() - started:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", metavar="NAME", help="only these, in this order")
    parser.add_argument("--peers", help="a folder with unsloth and the versions it needs, for PYTHONPATH")
    parser.add_argument("--rehearse", action="store_true", help="every kind of piece, small, on the CPU")
    parser.add_argument("--list", action="store_true", help="name the pieces and end")
    args = parser.parse_args()
    results = ROOT / ("outputs" if args.rehearse else "benchmarks/results") / "gpu_check"
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
        (results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"logs and results are in {results}")
    return 0 if all("done" in summary[name] for name in args.pieces or known) else 1


if __name__ == "__main__":
    sys.exit(main())
