"""How fast the tiny recipe trains on a CPU alone, and beside another process that computes, by how threads wait.

    python -m benchmarks.busy_cpu --json benchmarks/results/busy_cpu.json    # on a quiet machine; ten minutes

common/process_state.py sets GOMP_SPINCOUNT=1000. The default of GNU's OpenMP, which torch uses, is 300,000 (libgomp
manual, "GOMP_SPINCOUNT").
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results_folder import write_result
from common import REPOSITORY
from common.control_group import available_cpus
from common.run.metrics_file import read_metrics

ENVIRONMENTS = {
    "GOMP_SPINCOUNT=300000, the default of OpenMP": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000, ours": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "ours, with eight times as many threads as CPUs": {"OMP_NUM_THREADS": str(8 * available_cpus())},
}
# Threads of this process wait as OpenMP's default has it: other programs set nothing.
PEER = "import torch; a = torch.randn(512, 512); print(flush=True)\nwhile True: a @ a"
DATA = "data/tiny/train.jsonl"  # without the recipe's prompts, which take most of the time
WARMUP_STEPS = 5
START_SECONDS = 300.0
THREAD_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}


@contextlib.contextmanager
def busy_peer() -> Iterator[None]:
    """Another process multiplies matrices on all CPUs during the block."""
    with subprocess.Popen([sys.executable, "-c", PEER], env=clean_environment(), stdout=subprocess.PIPE) as peer:
        assert peer.stdout is not None
        peer.stdout.readline()
        try:
            yield
        finally:
            peer.kill()


def measure_environment(environment: dict[str, str], steps: int, seconds: float) -> dict[str, int]:
    """Tokens per second of the tiny recipe, alone ("quiet") and then, in the same run, beside busy_peer ("busy").

    Each over `steps` optimizer steps after WARMUP_STEPS, the second over the steps of `seconds` if those are fewer.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.Popen(
            [sys.executable, "-m", "recipes", "tiny", "--data", DATA, "--out", folder],
            env=clean_environment() | {"CUDA_VISIBLE_DEVICES": ""} | environment,
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
        )
        try:
            entries = wait_for_steps(Path(folder), run, WARMUP_STEPS + steps, START_SECONDS)
            quiet = rate(entries[WARMUP_STEPS:])
            with busy_peer():
                first = len(steps_of(Path(folder))) + WARMUP_STEPS
                wait_for_steps(Path(folder), run, first, seconds)
                entries = wait_for_steps(Path(folder), run, first + steps, seconds)
                busy = rate(entries[first:])
        finally:
            run.kill()
            run.wait()
    return {"quiet": round(quiet), "busy": round(busy)}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_metrics(folder) if "loss" in entry]


def wait_for_steps(folder: Path, run: "subprocess.Popen[bytes]", count: int, seconds: float) -> list[dict[str, Any]]:
    """The steps that are done when there are `count`, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while len(found := steps_of(folder)) < count and time.monotonic() < deadline:
        if run.poll() is not None:
            raise RuntimeError(f"the run ended after {len(found)} steps, with status {run.returncode}")
        time.sleep(0.05)
    return found


def rate(entries: list[dict[str, Any]]) -> float:
    """Tokens per second between the first and the last of these steps."""
    first, last = entries[0], entries[-1]
    return float((last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]))


def measure(steps: int, seconds: float) -> dict[str, Any]:
    """Measures each of ENVIRONMENTS."""
    table: dict[str, dict[str, int]] = {}
    for name, environment in ENVIRONMENTS.items():
        table[name] = measure_environment(environment, steps, seconds)
        print(f"{name:50} {table[name]['quiet']:8,} {table[name]['busy']:8,}", flush=True)
    return {"steps": steps, "seconds": seconds, "cpus": available_cpus(), "tokens_per_s": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60, help="at most, beside the busy process")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    result = measure(args.steps, args.seconds)
    if args.json:
        write_result(result, args.json)


if __name__ == "__main__":
    main()
