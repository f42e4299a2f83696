"""Times the forms in which an operator can be written beside each other; common/kernels has the faster one.

    python -m benchmarks.kernels            # shapes of Llama 3 8B on a GPU, small ones on a CPU

LoRA can join the frozen matmul in three ways:

- after it: clone, scale, add, as PEFT does;
- before it: the matmul accumulates into the LoRA branch (`addmm_`), as common.kernels.lora_linear does;
- inside it, as `rank` more columns of the inner size: x beside x A^T, W beside scale * B. Timed with the copies that
  this takes, and at best, as if both were laid out so already.

Then each operator is timed beside its PyTorch reference and liger-kernel, where that is installed. Results go to
benchmarks/results/kernels_<machine>.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results_folder import result_path
from common.kernels import REFERENCES, cross_entropy, rms_norm, rope, swiglu
from common.machine.device import this_machine

RANK = 16
LLAMA = {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)}
SMALL = {"q, o": (192, 192), "gate, up": (192, 512), "down": (512, 192)}
SHAPES = {"llama": LLAMA, "small": SMALL}


def microseconds(run: Callable[[], Any], repeats: int) -> float:
    """Of one run: the median of `repeats`, after three that warm up."""
    gpu = torch.cuda.is_available()
    times = []
    for _ in range(3 + repeats):
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e6 * sorted(times[3:])[repeats // 2]


def lora_forms(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[], Tensor]]:
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5
    a = torch.randn(RANK, inputs, device=device, dtype=dtype) / inputs**0.5
    b = torch.randn(outputs, RANK, device=device, dtype=dtype)
    wide_x, wide_weight = torch.cat((x, x @ a.t()), 1), torch.cat((weight, b), 1)
    return {
        "frozen matmul alone": lambda: x @ weight.t(),
        "after, clone and add": lambda: (x @ weight.t()).clone() + ((x @ a.t()) @ b.t()) * 1.0,
        "before, addmm_": lambda: ((x @ a.t()) @ b.t()).addmm_(x, weight.t()),
        "inside, with copies": lambda: torch.cat((x, x @ a.t()), 1) @ torch.cat((weight, b), 1).t(),
        "inside, at best": lambda: (x @ a.t(), wide_x @ wide_weight.t())[1],
    }


def operator_forms(
    tokens: int, small: bool, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yields operator, implementation, and a function that runs it."""
    hidden, inner, heads, key_heads, dim = (192, 512, 4, 2, 48) if small else (4096, 14336, 32, 8, 128)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, weight, gate, up, grad = random(tokens, hidden), random(hidden), *(random(tokens, inner) for _ in range(3))
    query, key, cos, sin = (
        random(tokens, heads * dim),
        random(tokens, key_heads * dim),
        *(random(tokens, dim) for _ in "cs"),
    )
    logits = random(min(tokens, 512), 512 if small else 128_256)  # a tile of the loss, whatever the tokens
    targets = torch.zeros(len(logits), device=device, dtype=torch.int64)
    arguments: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "rms_norm": (rms_norm.rms_norm_forward, (x, weight, 1e-5)),
        "rms_norm_backward": (rms_norm.rms_norm_backward, (x, x, weight, 1e-5, x)),
        "rope": (rope.rotate, (query, key, cos, sin, False)),
        "swiglu": (swiglu.swiglu, (gate, up)),
        "swiglu_backward_": (swiglu.swiglu_backward_, (grad, gate, up)),
        "cross_entropy_": (cross_entropy.cross_entropy_, (logits, targets, 1.0)),
    }
    for name, (operator, values) in arguments.items():
        yield name, "ours", partial(operator, *values)
        yield name, "reference", partial(REFERENCES[operator], *values)
    if device == "cpu":  # liger's are Triton kernels
        return
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction
    except ImportError:
        print("liger-kernel is not installed: left out")
        return
    yield "rms_norm", "liger", lambda: LigerRMSNormFunction.apply(x, weight, 1e-5)
    yield "swiglu", "liger", lambda: LigerSiLUMulFunction.apply(gate, up)
    shaped = [states.view(1, tokens, -1, dim).transpose(1, 2) for states in (query, key)]
    yield "rope", "liger, in place", lambda: LigerRopeFunction.apply(*shaped, cos[None], sin[None])


def main() -> int:
    machine = this_machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096] if machine.is_gpu else [256])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, help="folder of the .json")
    parser.add_argument("--shapes", choices=SHAPES, default="llama" if machine.is_gpu else "small")
    args = parser.parse_args()
    device, shapes = machine.device.type, SHAPES[args.shapes]
    found: list[dict[str, Any]] = []
    for tokens in args.tokens:
        for shape, (inputs, outputs) in shapes.items():
            for form, run in lora_forms(tokens, inputs, outputs, machine.dtype, device).items():
                found.append({"tokens": tokens, "what": f"LoRA linear, {shape}", "form": form})
                found[-1]["microseconds"] = microseconds(run, args.repeats)
        for name, form, run in operator_forms(tokens, args.shapes == "small", machine.dtype, device):
            found.append({"tokens": tokens, "what": name, "form": form})
            found[-1]["microseconds"] = microseconds(run, args.repeats)
    for entry in found:
        print(f"{entry['tokens']:6,}  {entry['what']:24} {entry['form']:22} {entry['microseconds']:10,.1f} us")
    report = {"date": date.today().isoformat(), "machine": str(machine), "torch": torch.__version__, "times": found}
    result_path("kernels", args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
