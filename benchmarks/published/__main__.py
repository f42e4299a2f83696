"""The ledger against peaks and speeds that others measured on their GPUs. No GPU; about five minutes on two cores.

    python -m benchmarks.published                       # every row
    python -m benchmarks.published --rows 1B "7B QLoRA"  # rows with one of these in their name
    python -m benchmarks.published --missing             # rows without a result: it goes on after a cut-off

The authors' transformers and PEFT are installed into .cache/published, beside this environment. Results are written
after each row to benchmarks/results/published_memory.json. docs/published.md says what they mean.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.published.environment import environment
from benchmarks.published.report import bias_lines, memory_lines, speed_lines
from benchmarks.published.rows import ROWS, Row
from benchmarks.results_folder import RESULTS, installed_versions, read_result, write_result
from common import REPOSITORY
from common.machine.device import this_machine
from common.recipe import UserError


def count_in_environment(row: Row) -> dict[str, Any]:
    """Counts the row in a process with the packages that its authors had. Raises UserError when that process fails."""
    variables = os.environ | {"PYTHONPATH": str(environment(row.stack.packages)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.published.count", row.name]
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{row.name} was not counted:\n{done.stderr}")
    counted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counted


def result_of(row: Row, counted: dict[str, Any]) -> dict[str, Any]:
    """What was published beside what was counted."""
    seconds = counted.pop("predicted_seconds")
    speeds = {
        gpu: {"published_seconds": row.rows * row.tokens / speed, "predicted_seconds": seconds[gpu]}
        for gpu, speed in row.tokens_per_s.items()
    }
    return {
        "source": asdict(row.source),
        "packages": dict(pin.split("==") for pin in row.stack.packages),
        "published_bytes": row.peak_bytes,
        "published_rest_bytes": row.rest_bytes,
        **counted,
        "speeds": speeds,
    }


def print_tables(results: dict[str, Any]) -> None:
    print("\n| run | transformers | published, bytes | predicted | ratio | at rest | the peak is in |")
    print("\n".join(memory_lines(results)))
    print("\n| run | GPU | a step, published | model with data sheet / published | with our speeds |")
    print("\n".join(speed_lines(results)))
    print("\n| GPU | runs | with data sheet | with our speeds |")
    print("\n".join(bias_lines(results)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "published_memory.json")
    args = parser.parse_args(argv)
    done: dict[str, Any] = read_result(args.out)["rows"] if args.out.exists() else {}
    chosen = [row for row in ROWS if any(part in row.name for part in args.rows)]
    if not chosen:
        print(f"error: no row has {' or '.join(map(repr, args.rows))} in its name", file=sys.stderr)
        return 2
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": str(this_machine()),
        "versions": installed_versions(("torch", "bitsandbytes")),
        "rows": {},
    }
    try:
        for row in chosen:
            if args.missing and row.name in done:
                continue
            done[row.name] = result_of(row, count_in_environment(row))
            results["rows"] = {row.name: done[row.name] for row in ROWS if row.name in done}
            write_result(results, args.out)
            print(f"{row.name}: {done[row.name]['counted_in_s']} s", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results["rows"] = {row.name: done[row.name] for row in ROWS if row.name in done}
    print_tables(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
