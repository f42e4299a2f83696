"""Shows where the time of our step goes: each kernel's share, largest first.

    python -m benchmarks.profile_step --model llama3-8b --tokens 4096        # on a GPU; random weights, no download
    python -m benchmarks.profile_step --model tiny --tokens 256              # on a CPU, by operator

torch.profiler records two micro-batches and the optimizer's step, without activation checkpointing unless --recompute.
The step's own time is that of another step, without the profiler. "gaps" is what no kernel fills of it: the GPU waits
for Python. Results go to benchmarks/results/profile_<model>_<machine>.json.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import random_step
from benchmarks.models import recipe_of
from benchmarks.results_folder import installed_versions, result_path, write_result
from common.machine.device import this_machine
from common.model.activation_checkpointing import Policy, checkpoint_activations
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.plan.forecast import Forecast
from common.plan.machine_plan import setting_of
from common.plan.speed import speed_of

# What a kernel does: the first pattern that its name matches. Names differ between cards and versions.
KERNEL_KINDS = {
    "copies": r"^mem(cpy|set)",
    "attention": r"flash|fmha|attention",
    "dequantisation": r"dequant",
    "optimizer": r"adam|optimizer|multi_tensor",
    "our kernels": r"^_\w+_kernel|common::",  # Triton's are called as the functions of common/kernels
    "matmul": r"gemm|cutlass|nvjet|xmma|matmul|aten::(add)?mm",
}


def kind_of(name: str) -> str:
    return next(
        (kind for kind, pattern in KERNEL_KINDS.items() if re.search(pattern, name, re.IGNORECASE)),
        "elementwise, other",
    )


def kernels_of(events: Iterable[Any], *, on_gpu: bool) -> list[dict[str, Any]]:
    """Microseconds and calls of each kernel, on a CPU of each operator, longest first. events: torch's key averages."""
    kernels = []
    for event in events:
        if on_gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue  # a launch, or a range that holds kernels: it would count them a second time
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent:
            kernels.append({"name": event.key, "kind": kind_of(event.key), "calls": event.count, "microseconds": spent})
    return sorted(kernels, key=lambda kernel: -kernel["microseconds"])


def profile_step(model_name: str, tokens: int, layers: int | None, recompute: bool) -> dict[str, Any]:
    """Profiles an optimizer step. Returns microseconds of each kernel, on a CPU of each operator, and of the step."""
    machine = this_machine()
    recipe = recipe_of(model_name)
    if model_name != "tiny":
        recipe = replace(recipe, model=replace(recipe.model, weights="random", layers=layers))
    forecast = Forecast(recipe, setting_of(machine, recipe.model), speed_of(machine.name))
    model = attach_lora(load_4bit(recipe.model, machine), recipe.lora).train()
    use_lean_layers(model, recipe.train.kernels)
    checkpoint_activations(model, Policy(forecast.layers, 0 if recompute else forecast.layers))
    step = random_step(model, forecast, tokens, machine)
    wait = torch.cuda.synchronize if machine.is_gpu else lambda: None  # the optimizer's kernels run on after step()
    for _ in range(3):
        step()
    wait()
    started = time.perf_counter()
    step()
    wait()
    microseconds = 1e6 * (time.perf_counter() - started)
    activity = ProfilerActivity.CUDA if machine.is_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        wait()
    kernels = kernels_of(profiler.key_averages(), on_gpu=machine.is_gpu)
    return {
        "date": date.today().isoformat(),
        "machine": str(machine),
        "versions": installed_versions(("torch", "transformers", "peft", "bitsandbytes")),
        "model": model_name,
        "tokens": 2 * tokens,
        "recompute": recompute,
        "step_microseconds": microseconds,
        "kernels": kernels,
    }


def describe_profile(result: dict[str, Any], rows: int = 25) -> str:
    """The shares of each kind of kernel, then of the `rows` longest kernels."""
    total, kernels = result["step_microseconds"], result["kernels"]
    lines = [f"{result['model']}, {result['tokens']:,} tokens in two micro-batches: {total / 1e3:,.1f} ms a step", ""]
    shares: dict[str, float] = {}
    for kernel in kernels:
        shares[kernel["kind"]] = shares.get(kernel["kind"], 0.0) + kernel["microseconds"]
    shares["gaps"] = max(0.0, total - sum(shares.values()))
    lines += [f"{spent / total:6.1%}  {kind}" for kind, spent in sorted(shares.items(), key=lambda item: -item[1])]
    lines += ["", "  share   calls  kernel"]
    lines += [
        f"{kernel['microseconds'] / total:7.2%} {kernel['calls']:7,}  {kernel['name'][:90]}"
        for kernel in kernels[:rows]
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--tokens", type=int, default=4096, help="a micro-batch")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--recompute", action="store_true", help="every layer recomputes")
    parser.add_argument("--out", type=Path, help="folder of the .json")
    args = parser.parse_args()
    result = profile_step(args.model, args.tokens, args.layers, args.recompute)
    path = result_path(f"profile_{args.model.replace('-', '_')}", args.out)
    write_result(result, path)
    print(f"{describe_profile(result)}\n\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
