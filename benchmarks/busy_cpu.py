"""How fast the tiny recipe trains on a CPU alone, and beside another process that computes, by how threads wait.

    python -m benchmarks.busy_cpu --json benchmarks/results/busy_cpu.json    # on a quiet machine; ten minutes or more

common/process_state.py sets GOMP_SPINCOUNT=1000. The default of GNU's OpenMP, which torch uses, is 300,000 (libgomp
manual, "GOMP_SPINCOUNT").
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results_folder import write_result
from common import REPOSITORY
from common.cpu_quota import available_cpus
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


def tokens_per_s(environment: dict[str, str], steps: int) -> float:
    """Of the tiny recipe, over all steps but the first fifth."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "recipes", "tiny", "--out", folder, "--max-steps", str(steps)],
            env=clean_environment() | {"CUDA_VISIBLE_DEVICES": ""} | environment,
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
        )
        entries = [entry for entry in read_metrics(Path(folder)) if "loss" in entry]
    first, last = entries[steps // 5], entries[-1]
    return float((last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]))


def measure(steps: int) -> dict[str, Any]:
    """Tokens per second of each environment, alone ("quiet") and beside busy_peer ("busy")."""
    table: dict[str, dict[str, float]] = {}
    for name, environment in ENVIRONMENTS.items():
        quiet = tokens_per_s(environment, steps)
        with busy_peer():
            busy = tokens_per_s(environment, steps)
        table[name] = {"quiet": round(quiet), "busy": round(busy)}
        print(f"{name:50} {quiet:8,.0f} {busy:8,.0f}", flush=True)
    return {"steps": steps, "cpus": available_cpus(), "tokens_per_s": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    result = measure(args.steps)
    if args.json:
        write_result(result, args.json)


if __name__ == "__main__":
    main()
