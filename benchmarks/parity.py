"""Compares our run with a plain TRL + PEFT script on the same data, seed and hyperparameters: losses and time.

    make parity                     # the tiny recipe, 60 steps, five runs of each, in turn
    make parity ARGS="--loss dpo"   # preferences, beside TRL's DPOTrainer; or kto: benchmarks/preference_parity.py

The tolerances. Both train the same rows in the same order, and start from the same adapter, whose B is 0. So the first
losses are equal, up to the order of sums in fp32. From then on our adapters are fp32 and TRL's are bf16, because it
casts the adapters of a 4-bit model. bf16 has 8 bits of precision, and the adapters change the loss by 5.4 nats at most.

Ours packs in groups of 1,000 examples here, as TRL does.
Without a warmup, which transformers begins at a learning rate of 0 and we do not (common.run.lr_schedule).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import preference_parity
from benchmarks.results_folder import write_result
from common import REPOSITORY
from common.machine.gpus import use_one_gpu
from recipes.tiny import RECIPE

FIRST_LOSS_TOLERANCE = 1e-4  # nats: fp32 sums in another order
LOSS_TOLERANCE = 0.02  # nats, at each step: 2^-8 of the 5.4 nats of the first loss


# TRL packs 1,000 examples at a time, half of the tiny data; we pack all of it at once, which gives other rows.
GROUP_TOKENS = 47_000

RUN_OURS = f"""
import sys
from dataclasses import replace
from common.cli import run
from common.data import packing
from recipes.tiny import RECIPE, main
packing.GROUP_TOKENS = {GROUP_TOKENS}
sys.exit(run(main, replace(RECIPE, train=replace(RECIPE.train, warmup_ratio=0.0))))
"""


def run_ours(steps: int, out: Path) -> dict[str, Any]:
    arguments = ["--max-steps", str(steps), "--out", str(out), "--overwrite"]
    subprocess.run(
        [sys.executable, "-c", RUN_OURS, *arguments],
        check=True,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps_only = [entry for entry in entries if "loss" in entry]
    return {"losses": [entry["loss"] for entry in steps_only], "seconds": steps_only[-1]["seconds"]}


def run_plain(steps: int, out: Path, micro_batch_rows: int, accumulation: int) -> dict[str, Any]:
    train, lora = RECIPE.train, RECIPE.lora
    values = {
        "model": RECIPE.model.name,
        "data": RECIPE.data.source,
        "out": out,
        "rank": lora.rank,
        "alpha": lora.alpha,
        "seq-len": train.seq_len,
        "micro-batch-rows": micro_batch_rows,
        "accumulation": accumulation,
        "max-steps": steps,
        "seed": train.seed,
        "learning-rate": train.learning_rate,
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plain_trl", *flags],
        check=True,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(steps: int, repeats: int) -> dict[str, Any]:
    """Runs both in turn, `repeats` times. Returns the losses of the first pair in nats, and medians of the times."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            ours = run_ours(steps, Path(folder) / "ours")
            plan = json.loads((Path(folder) / "ours" / "run.json").read_text())["plan"]
            plain = run_plain(steps, Path(folder) / "plain", plan["micro_batch_rows"], plan["accumulation"])
            pairs.append((ours, plain))
            print(f"pair {repeat + 1}: ours {ours['seconds']:.1f} s, plain {plain['seconds']:.1f} s", flush=True)
        run = json.loads((Path(folder) / "ours" / "run.json").read_text())
    ours, plain = pairs[0]
    differences = [abs(a - b) for a, b in zip(ours["losses"], plain["losses"], strict=True)]
    return {
        "steps": steps,
        "machine": run["machine"],
        "versions": run["versions"],
        "ours_seconds": statistics.median(o["seconds"] for o, _ in pairs),
        "plain_seconds": statistics.median(p["seconds"] for _, p in pairs),
        "speed_ratio": statistics.median(p["seconds"] / o["seconds"] for o, p in pairs),
        "first_loss_difference": differences[0],
        "largest_loss_difference": max(differences),
        "ours_losses": ours["losses"],
        "plain_losses": plain["losses"],
    }


def same_losses(result: dict[str, Any]) -> bool:
    """Whether the losses that `compare` returned are within the tolerances."""
    first, largest = result["first_loss_difference"], result["largest_loss_difference"]
    return bool(first <= FIRST_LOSS_TOLERANCE and largest <= LOSS_TOLERANCE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("sft", "dpo", "kto"), default="sft")
    parser.add_argument("--precompute", action="store_true", help="dpo, kto: TRL computes its reference before the run")
    parser.add_argument("--steps", type=int, help="60, with preferences 30")
    parser.add_argument("--repeats", type=int, help="5, with preferences 1")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    use_one_gpu()  # both runs inherit it; TRL refuses several
    if args.loss != "sft":
        steps, repeats = args.steps or 30, args.repeats or 1
        return preference_parity.main(args.loss, steps, repeats, precompute=args.precompute, json_path=args.json)
    args.steps = args.steps or 60
    result = compare(args.steps, args.repeats or 5)
    print(
        f"losses: the first differs by {result['first_loss_difference']:.1e} nats (limit {FIRST_LOSS_TOLERANCE:.0e}), "
        f"the worst of {args.steps} by {result['largest_loss_difference']:.1e} (limit {LOSS_TOLERANCE:.0e})\n"
        f"time:   ours {result['ours_seconds']:.1f} s, plain TRL + PEFT {result['plain_seconds']:.1f} s, "
        f"{result['speed_ratio']:.2f} x as fast"
    )
    if args.json:
        write_result(result, args.json)
    return 0 if same_losses(result) else 1


if __name__ == "__main__":
    sys.exit(main())
