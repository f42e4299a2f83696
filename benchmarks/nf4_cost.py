"""What NF4 costs: the held-out loss of a 16-bit base and of its NF4 form, before and after the same short run.

    python -m benchmarks.nf4_cost --data "tool calls=data/tiny/train.jsonl" --data "instructions=instructions.json"

For each data set and seed an adapter is trained on the NF4 base, and another one on the 16-bit base: the same rows in
the same order, the same first weights of the adapter. The adapter that was trained on NF4 is then put on the 16-bit
base too, which is what `make merge BASE=original` makes. All compute in bf16. Writes nf4_cost_<model>_<gpu or cpu>.json
into benchmarks/results after each run, goes on where it was stopped, and prints a table in Markdown.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from benchmarks.results_folder import installed_versions, read_result, result_path, write_result
from benchmarks.short_run import Settings, ShortRun, add_flags, bf16_machine, data_of, finite, settings_of
from common.exit_status import exit_status
from common.model.loading import load_4bit
from common.model.nf4 import dequantize, names_of_4bit_linears, quantize
from common.process_state import quiet_libraries
from common.recipe import LoraSpec, ModelSpec, UserError

CASES = {
    "base_16": "16-bit base",
    "base_4": "NF4 base",
    "trained_16": "trained on the 16-bit base",
    "trained_4": "trained on the NF4 base",
    "trained_4_on_16": "trained on the NF4 base, put on the 16-bit base",
}


@dataclass(frozen=True)
class Cost:
    """What all runs share. data: the file or hub data set of each name."""

    settings: Settings
    data: dict[str, str]
    lora: LoraSpec
    learning_rate: float

    def begin_result(self, path: Path) -> dict[str, Any]:
        """The result at `path`, to go on with, or a new one. Raises UserError when that one had other settings."""
        ours = {
            "settings": asdict(self.settings),
            "data": self.data,
            "rank": self.lora.rank,
            "alpha": self.lora.alpha,
            "learning_rate": self.learning_rate,
        }
        result = read_result(path) if path.exists() else ours | {"runs": []}
        if other := [name for name, value in ours.items() if result[name] != value]:
            raise UserError(f"{path} has other {', '.join(other)}; give this result a file of its own with --json")
        return result | {
            "machine": str(bf16_machine()),
            "versions": installed_versions(("torch", "transformers", "peft", "bitsandbytes")),
            "date": date.today().isoformat(),
        }


def run_pair(cost: Cost, data: str, seed: int) -> dict[str, Any]:
    """Trains on the NF4 base and on the 16-bit base. Returns the held-out losses of CASES in nats, None for NaN."""
    started = time.perf_counter()
    arguments = (cost.settings, cost.data[data], cost.lora, cost.learning_rate, seed)
    losses: dict[str, float] = {}
    run = ShortRun(*arguments, bits=4)
    tokens = run.held_out_tokens()
    losses["base_4"] = run.held_out_loss()
    run.train()
    losses["trained_4"] = run.held_out_loss()
    adapter = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(run.model).items()}
    run = ShortRun(*arguments, bits=16)
    fresh = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(run.model).items()}
    losses["base_16"] = run.held_out_loss()
    set_peft_model_state_dict(run.model, adapter)
    losses["trained_4_on_16"] = run.held_out_loss()
    set_peft_model_state_dict(run.model, fresh)
    run.train()
    losses["trained_16"] = run.held_out_loss()
    seconds = round(time.perf_counter() - started, 1)
    found = {case: finite(losses[case]) for case in CASES}
    return {"data": data, "seed": seed, "held_out_tokens": tokens, "losses": found, "seconds": seconds}


def rounding_error(model: str) -> dict[str, float]:
    """How far NF4 moves the linear weights, and normally distributed values, for which it was made.

    Root mean square of the errors, as a share of that of the values.
    """
    base = load_4bit(ModelSpec(model, bits=16), bf16_machine())
    weights = [base.get_submodule(name).weight.detach() for name in names_of_4bit_linears(base)]
    normal = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).to(weights[0].device)
    return {"weights": _relative_error(weights), "normal": _relative_error([normal])}


def _relative_error(tensors: list[torch.Tensor]) -> float:
    errors, squares = 0.0, 0.0
    for tensor in tensors:
        values = tensor.float()
        errors += (dequantize(*quantize(values)) - values).square().sum().item()
        squares += values.square().sum().item()
    return float((errors / squares) ** 0.5)


def measure(cost: Cost, seeds: list[int], path: Path) -> dict[str, Any]:
    """Runs what the result at `path` does not have yet, and writes it after each pair of runs. Returns it."""
    result = cost.begin_result(path)
    for seed in seeds:
        for data in cost.data:
            if not any((run["data"], run["seed"]) == (data, seed) for run in result["runs"]):
                result["runs"].append(run_pair(cost, data, seed))
                write_result(result, path)
                print(f"{data}, seed {seed}: {result['runs'][-1]['losses']}", flush=True)
    if "rounding_error" not in result:
        result["rounding_error"] = rounding_error(cost.settings.model)
        write_result(result, path)
    return result


def table(result: dict[str, Any]) -> str:
    """The mean held-out loss over the seeds, the lowest and highest behind it, and the difference from 16 bits."""
    settings, names = result["settings"], list(dict.fromkeys(run["data"] for run in result["runs"]))
    rows = f"{settings['rows_per_step']} row" + "s" * (settings["rows_per_step"] > 1)
    of = {name: [run for run in result["runs"] if run["data"] == name] for name in names}
    sizes = "; ".join(f"{n}: {of[n][0]['held_out_tokens']:,} held-out tokens, seeds: {len(of[n])}" for n in names)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{settings['model']}: {settings['steps']} steps of {rows} of {settings['seq_len']:,} tokens, rank "
        f"{result['rank']}, alpha {result['alpha']:g}, learning rate {result['learning_rate']:g}. {sizes}. "
        f"{result['machine']}, {result['date']}; {versions}.",
        "",
        f"| held-out loss, nats per token | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for case, words in CASES.items():
        lines.append(f"| {words} | {' | '.join(_cell(result, data, case) for data in names)} |")
    if "rounding_error" in result:
        weights, normal = result["rounding_error"]["weights"], result["rounding_error"]["normal"]
        lines += ["", f"NF4 moves these weights by {weights:.2%}, root mean square, and normal ones by {normal:.2%}."]
    return "\n".join(lines)


def _cell(result: dict[str, Any], data: str, case: str) -> str:
    of_data = [run["losses"] for run in result["runs"] if run["data"] == data]
    losses = [run[case] for run in of_data]
    if None in losses:
        return "diverged"
    text = f"{mean(losses):.4f}"
    if max(losses) > min(losses):
        text += f" ({min(losses):.4f} – {max(losses):.4f})"
    reference = f"{case.split('_')[0]}_16"
    if case != reference and None not in [run[reference] for run in of_data]:
        text += f", {mean(run[case] - run[reference] for run in of_data):+.4f}"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, held_out_rows=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="below the best one of so few steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags = parser.parse_args(arguments)
    quiet_libraries()
    if flags.draw:
        return exit_status(lambda: print(table(read_result(flags.draw))), str(flags.draw.parent))
    path = flags.json or result_path(f"nf4_cost_{Path(flags.model).name}")

    def run() -> None:
        cost = Cost(settings_of(flags), data_of(flags), LoraSpec(flags.rank, flags.alpha), flags.learning_rate)
        print(table(measure(cost, flags.seeds, path)))

    return exit_status(run, str(path.parent))


if __name__ == "__main__":
    sys.exit(main())
